"""The programs, a module each: its options, what it refuses, what it calls; ``python -m megatron_cca`` lists them."""
