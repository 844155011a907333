"""Measure how far precision moves a policy from its reference: ``python -m megatron_cca measure-reference-bias``."""

from megatron_cca.programs.measure_reference_bias import main

if __name__ == "__main__":
    main()
