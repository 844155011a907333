"""Everything that patches or uses internals of Megatron-Core and Transformer Engine, where no public API exists.

One file for each concern. Its head says why it is needed, and which version it is for. ``relied_on`` lists the names
that each file needs and how they must look. ``tests/unit/test_megatron_contract.py`` checks every one of them, so that
an upgrade of Megatron-Core fails there, by name.
"""

from __future__ import annotations

from collections.abc import Iterator

# The file that marks the format, and what stands in it.
FORMAT_FILE, FORMAT = "metadata.json", {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
# The key of the state that is not sharded, and its prefix.
COMMON_PREFIX = "common_state"
COMMON_STATE = f"{COMMON_PREFIX}/shard_0_1"
# A pickle that older versions of Megatron-Core wrote.
OLD_COMMON_FILE = "common.pt"

EXTRA_STATE = "_extra_state"
FINAL_NORM = "decoder.final_layernorm"
_LAYERS = "decoder.layers"
HEAD_NORMS = ("self_attention.q_layernorm", "self_attention.k_layernorm")
_PROJECTIONS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


def extra_state_keys(num_layers: int, *, qk_layernorm: bool) -> Iterator[str]:
    """Yield the unique keys of all extra states that a plain GPTModel loads, with local or Transformer Engine layers.

    Without FP8 these states are empty. Both kinds of layers then accept None.
    """
    yield from (
        f"{_LAYERS}.{name}.{EXTRA_STATE}/shard_{layer}_{num_layers}"
        for name in (*_PROJECTIONS, *(HEAD_NORMS if qk_layernorm else ()))
        for layer in range(num_layers)
    )
    # Only Transformer Engine's norms have an extra state.
    yield f"{FINAL_NORM}.{EXTRA_STATE}/shard_0_1"
