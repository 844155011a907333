"""The programs, one module each, with its options. ``python -m megatron_cca`` lists them."""
