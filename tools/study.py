"""Run a study: ``python -m megatron_cca study``."""

from megatron_cca.programs.study import main

if __name__ == "__main__":
    main()
