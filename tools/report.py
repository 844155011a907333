"""Write one HTML file about a run: ``python -m megatron_cca report``."""

from megatron_cca.programs.report import main

if __name__ == "__main__":
    main()
