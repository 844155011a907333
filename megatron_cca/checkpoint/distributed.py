"""Save and load Megatron distributed checkpoints: any layout in, any layout out."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException

from megatron_cca.checkpoint import layout
from megatron_cca.errors import UserError

# The one sharding of the optimizer's state that any other TP x PP x DP can load.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


def save(root: Path, iteration: int, chunks: list[torch.nn.Module], optimizer, summary: dict) -> None:
    """Write model and optimizer; collective over all ranks.

    Args:
        root: the run's ``checkpoints`` folder.
        iteration: number of completed steps.
        chunks: this rank's model chunks, without DDP.
        optimizer: Megatron's optimizer.
        summary: plain data kept in ``checkpoint.json``.
    """
    partial = layout.partial_folder(root, iteration)
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(_state_dict(chunks, optimizer, is_loading=False), str(partial))
    dist.barrier()
    if dist.get_rank() == 0:
        layout.finalize(partial, root, iteration, summary)
    dist.barrier()


def load_weights(folder: Path, chunks: list[torch.nn.Module], key: str) -> None:
    """Fill this rank's model chunks from a whole checkpoint; collective over all ranks.

    Raises:
        UserError: tensors missing or misshapen; ``key`` says which configuration key named the checkpoint.
    """
    _fill(chunks, _load(_state_dict(chunks), folder, key))


def load_training_state(folder: Path, chunks: list[torch.nn.Module], optimizer, key: str) -> None:
    """Fill model chunks and optimizer from a checkpoint of any layout; collective over all ranks."""
    state = _load(_state_dict(chunks, optimizer, is_loading=True), folder, key)
    _fill(chunks, state)
    optimizer.load_state_dict(state["optimizer"])


def _state_dict(chunks: list[torch.nn.Module], optimizer=None, is_loading: bool = True) -> dict:
    # The tensors carry global names, so that a chunk's place in this dict does not bind the checkpoint to a layout.
    state = {f"model{index}": chunk.sharded_state_dict(metadata=_METADATA) for index, chunk in enumerate(chunks)}
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(dict(state), is_loading=is_loading, metadata=_METADATA)
    return state


def _fill(chunks: list[torch.nn.Module], state: dict) -> None:
    for index, chunk in enumerate(chunks):
        chunk.load_state_dict(state[f"model{index}"])


def _load(template: dict, folder: Path, key: str) -> dict:
    try:
        return dist_checkpointing.load(template, str(folder))
    except CheckpointingException as error:
        raise UserError(f"{key}: {folder} does not fit this model: {str(error).splitlines()[0]}") from None
