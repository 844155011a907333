"""Draw images from a checkpoint: ``python -m megatron_cca generate``."""

from megatron_cca.programs.generate import main

if __name__ == "__main__":
    main()
