"""Names in a distributed checkpoint of Megatron-Core 0.19.2, for code that does without Megatron-Core."""

from __future__ import annotations

from collections.abc import Iterator

# The file that marks the format, and what stands in it.
FORMAT_FILE, FORMAT = "metadata.json", {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
# Where Megatron-Core keeps what is not sharded: a prefix of its keys, and the one key there is.
COMMON_PREFIX = "common_state"
COMMON_STATE = f"{COMMON_PREFIX}/shard_0_1"
# Pickled states of older versions of Megatron-Core.
OLD_COMMON_FILE = "common.pt"

EXTRA_STATE = "_extra_state"
FINAL_NORM = "decoder.final_layernorm"
_LAYERS = "decoder.layers"
_PROJECTIONS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


def extra_state_keys(num_layers: int) -> Iterator[str]:
    """Unique keys of all extra states that a plain GPTModel asks for, of local layers or of Transformer Engine's.

    Without FP8 they hold nothing: both kinds of layers take None.
    """
    yield from (
        f"{_LAYERS}.{name}.{EXTRA_STATE}/shard_{layer}_{num_layers}"
        for name in _PROJECTIONS
        for layer in range(num_layers)
    )
    # Only Transformer Engine's norm has one.
    yield f"{FINAL_NORM}.{EXTRA_STATE}/shard_0_1"
