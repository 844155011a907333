"""Everything that patches or uses internals of Megatron-Core and Transformer Engine, where no public API exists.

There is one file for each concern. Its docstring says why it is needed, and for which version. Its ``RELIED_ON`` lists
the names that it needs, and what must be true of each. ``tests/unit/test_megatron_contract.py`` checks all of them. So
an incompatible version of Megatron-Core fails there, and the test names what changed.
"""
