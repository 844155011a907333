"""Everything that patches or reaches into Megatron-Core and Transformer Engine where they have no public door.

One file for each concern. Its head says why it is needed, and which version it is for. ``relied_on`` lists the names
that each file needs and how they must look. ``tests/unit/test_megatron_contract.py`` checks every one of them, so that
an upgrade of Megatron-Core fails there, by name.
"""
