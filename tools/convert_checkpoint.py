"""Bring checkpoints in from Hugging Face and out again: ``python -m megatron_cca convert``."""

from megatron_cca.programs.convert import main

if __name__ == "__main__":
    main()
