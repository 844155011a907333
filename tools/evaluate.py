"""Evaluate sets of images: ``python -m megatron_cca evaluate``."""

from megatron_cca.programs.evaluate import main

if __name__ == "__main__":
    main()
