"""Everything that patches or reaches into Megatron-Core and Transformer Engine where they have no public door.

One file for each concern. Its head says why it is needed, and which version it is for. Its ``RELIED_ON`` lists the
names that it needs and how each of them must look. ``tests/unit/test_megatron_contract.py`` checks every one of them,
so that an upgrade of Megatron-Core fails there, by name.
"""
