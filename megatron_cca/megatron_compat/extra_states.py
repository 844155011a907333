"""The layers' extra states in a checkpoint's sharded state: which are saved, and which are asked for.

Transformer Engine's layers keep FP8 scales in them, and local layers nothing. Both take None for "start afresh", and
plain Megatron refuses a checkpoint that lacks one. Transformer Engine 2.11 to 2.19 pickles the scales; from 2.16 on it
refuses to unpickle them. For megatron-core 0.19.2.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.safe_globals import SafeUnpickler

from megatron_cca.megatron_compat.checkpoint_format import EXTRA_STATE, FINAL_NORM

# Transformer Engine 2.16 and later unpickle the extra states of FP8's delayed scaling only where it is 1.
_TE_MAY_UNPICKLE = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"


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


@contextmanager
def checked_extra_states() -> Iterator[None]:
    """Within the block, Transformer Engine takes pickled extra states of layers.

    Only for those that were read under ``checkpoint.safe_pickle``, which has refused what would run anything. The
    environment is left as it was.
    """
    before = os.environ.get(_TE_MAY_UNPICKLE)
    os.environ[_TE_MAY_UNPICKLE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_TE_MAY_UNPICKLE]
        else:
            os.environ[_TE_MAY_UNPICKLE] = before


def is_of_a_recipe(module: str, name: str) -> bool:
    """Return whether a pickled extra state may name this class: Megatron-Core's list without numpy's functions."""
    return module.partition(".")[0] != "numpy" and (module, name) in SafeUnpickler._SAFE_CLASSES


def _is_extra_state(item: object) -> bool:
    return isinstance(item, ShardedObject) and item.key.endswith(EXTRA_STATE)


def _is_empty(extra_state: object) -> bool:
    return extra_state is None or (isinstance(extra_state, torch.Tensor) and not extra_state.numel())
