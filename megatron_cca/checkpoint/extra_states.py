"""The layers' extra states in a checkpoint's sharded state: which are saved, and which are asked for.

Transformer Engine's layers keep FP8 scales in them, and local layers nothing. Both take None for "start afresh", and
plain Megatron refuses a checkpoint that lacks one.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject

from megatron_cca.checkpoint.megatron_lm import EXTRA_STATE, FINAL_NORM


def with_all_extra_states(state: dict) -> dict:
    """A chunk's sharded state with all extra states that plain layers of either kind ask for."""
    weight, name = state.get(f"{FINAL_NORM}.weight"), f"{FINAL_NORM}.{EXTRA_STATE}"
    if weight is None:
        return state
    return {name: ShardedObject(name, None, (1,), (0,), weight.replica_id), **state}


def without_empty_extra_states(state: dict) -> dict:
    """A chunk's sharded state without the extra states that hold nothing.

    So a LoRA run is saved. A plain GPTModel would take the weights and leave the adapters without a word; now Megatron
    says that a key is missing.
    """
    return {name: item for name, item in state.items() if not (_is_extra_state(item) and _is_empty(item.data))}


def without_absent_extra_states(state: dict, stored: Collection[str]) -> tuple[dict, list[str]]:
    """A chunk's sharded state without the extra states that a checkpoint does not have, and their names.

    Args:
        state: of the chunk.
        stored: Megatron's unique keys of what is no tensor in the checkpoint.
    """
    absent = [name for name, item in state.items() if _is_extra_state(item) and item.unique_key not in stored]
    return {name: item for name, item in state.items() if name not in absent}, absent


def _is_extra_state(item: object) -> bool:
    return isinstance(item, ShardedObject) and item.key.endswith(EXTRA_STATE)


def _is_empty(extra_state: object) -> bool:
    return extra_state is None or (isinstance(extra_state, torch.Tensor) and not extra_state.numel())
