"""Plan a run before it costs anything: ``python -m megatron_cca plan``."""

from megatron_cca.programs.plan import main

if __name__ == "__main__":
    main()
