"""Everything that patches or uses internals of Megatron-Core and Transformer Engine, where no public API exists.

One file for each concern. Its head says why it is needed, and which version it is for. ``relied_on`` lists the names
that each file needs and how they must look. ``tests/unit/test_megatron_contract.py`` checks every one of them, so that
an upgrade of Megatron-Core fails there, by name.
"""
