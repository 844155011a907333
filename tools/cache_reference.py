"""Compute the frozen reference's log-probabilities once: ``python -m megatron_cca cache-reference``."""

from megatron_cca.programs.cache_reference import main

if __name__ == "__main__":
    main()
