"""Load Megatron distributed checkpoints: any layout in, any layout out. Pickles may hold plain data only.

How Megatron-Core 0.19 reads the parts of a checkpoint:

- tensors: ``torch.load`` with ``weights_only``, which is safe;
- the index ``.metadata``: ``pickle.load``;
- objects (``common_state``, the layers' extra states, the optimizer's objects): ``torch.load`` with
  ``weights_only=False``;
- ``common.pt``, which only older versions wrote: an unpickler that allows unsafe functions of numpy.

Transformer Engine then unpickles the bytes of the layers' extra states.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch.distributed.checkpoint.api import CheckpointException

from megatron_cca.checkpoint.integrity import CheckpointIndex, check_whole_together
from megatron_cca.checkpoint.summary import common_state, saved_config
from megatron_cca.config import Config, LoraConfig
from megatron_cca.errors import UserError
from megatron_cca.io.pickles import load_tensors, unpickled
from megatron_cca.megatron_compat import COMMON_PREFIX, EXTRA_STATE, OLD_COMMON_FILE
from megatron_cca.megatron_compat.checkpoints import (
    checked_extra_states,
    is_of_a_recipe,
    replaced_reading,
    with_all_extra_states,
    without_absent_extra_states,
    without_empty_extra_states,
)
from megatron_cca.megatron_compat.optimizer_state import (
    keep_present_settings,
    leave_out_classes,
    let_parts_count,
    padding_between_buckets,
)

# Megatron-LM keeps its arguments in a Namespace.
_ALLOWED_IN_COMMON_STATE = [(Namespace, "argparse.Namespace")]
# Only this sharding of the optimizer state loads at any other TP x PP x DP.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


@contextmanager
def plain_data_only(stored: CheckpointIndex) -> Iterator[None]:
    """Prevent Megatron from running code of a checkpoint that it reads within the block.

    Args:
        stored: the checkpoint. Its index is already read and checked.

    Raises:
        UserError: there is a ``common.pt``. In the block: a file is damaged, or holds more than plain data. Names the
            file.
    """
    if (stored.folder / OLD_COMMON_FILE).exists():
        raise UserError(
            f"{stored.option}: {stored.folder / OLD_COMMON_FILE} is a pickle of an older Megatron, which is not "
            "read; choose another checkpoint"
        )

    def load(content: bytes, name: str) -> Any:
        return _loaded(content, name, stored)

    with replaced_reading(stored.folder, stored.index, load):
        try:
            yield
        except CheckpointException as error:
            # A BaseException of torch, with one failure for each rank. Here there is one rank.
            cause = next(iter(error.failures.values()))[0]
            if isinstance(cause, UserError):
                raise cause from None
            why = (str(cause).splitlines() or [type(cause).__name__])[0]
            raise UserError(f"{stored.option}: {stored.folder} cannot be read, a file is damaged: {why}") from None


def load_weights(folder: Path, chunks: list[torch.nn.Module], key: str) -> None:
    """Load the weights of a whole checkpoint into this rank's model chunks. Collective over all ranks.

    The adapters of a LoRA run are merged into the weights, unless the chunks have adapters themselves.

    Args:
        folder: the checkpoint's own folder.
        chunks: this rank's model chunks.
        key: the configuration key that named the checkpoint, for messages.

    Raises:
        UserError: a file is damaged, or a tensor is missing or has another shape.
    """
    problem = check_whole_together(folder, key)
    if problem is not None:
        raise UserError(problem)
    settings = saved_config(folder, key).lora
    if settings.dim is None or adapter_settings(chunks) is not None:
        _fill(chunks, _load(state_dict(chunks), folder, key))
        return
    from megatron_cca.models import lora

    lora.attach(chunks, settings, seed=None)
    _fill(chunks, _load(state_dict(chunks), folder, key))
    lora.merge(chunks)


def load_training_state(folder: Path, chunks: list[torch.nn.Module], optimizer, key: str) -> None:
    """Load weights, adapters and optimizer state from a checkpoint of any layout. Collective over all ranks.

    The optimizer keeps the settings of the configuration, such as betas. :func:`integrity.newest_whole` must have
    checked the checkpoint before.

    Raises:
        UserError: see :func:`check_master_weights`; also if a tensor is missing or has another shape.
    """
    from megatron_cca.checkpoint.stored_tensors import StoredTensors, check_master_weights

    check_master_weights(StoredTensors(folder, key))
    state = _load(state_dict(chunks, optimizer, is_loading=True), folder, key)
    _fill(chunks, state)
    keep_present_settings(state["optimizer"], optimizer.param_groups)
    optimizer.load_state_dict(state["optimizer"])
    let_parts_count(optimizer)


def state_dict(chunks: list[torch.nn.Module], optimizer=None, is_loading: bool = True) -> dict:
    """Return this rank's shards under their global names, for Megatron to save or load. Collective over all ranks."""
    # Megatron stores process groups in the metadata. A copy for each call keeps old groups out of the next layout.
    # The tensors have global names. So a chunk's key in this dict does not bind the checkpoint to a layout.
    state = {f"model{index}": chunk.sharded_state_dict(metadata=dict(_METADATA)) for index, chunk in enumerate(chunks)}
    if optimizer is not None:
        with padding_between_buckets(optimizer):
            state["optimizer"] = optimizer.sharded_state_dict(
                dict(state), is_loading=is_loading, metadata=dict(_METADATA)
            )
    return state


def state_to_save(chunks: list[torch.nn.Module], optimizer, config: Config, iteration: int) -> dict:
    """Return the state to save: :func:`state_dict` and what plain Megatron needs. Collective over all ranks.

    Args:
        chunks: this rank's model chunks, without DDP.
        optimizer: Megatron's optimizer, or None.
        config: the run's configuration.
        iteration: number of completed steps.
    """
    state = state_dict(chunks, optimizer, is_loading=False)
    leave_out_classes(state.get("optimizer", {}))
    adapted = adapter_settings(chunks) is not None
    for name in [name for name in state if name != "optimizer"]:
        state[name] = without_empty_extra_states(state[name]) if adapted else with_all_extra_states(state[name])
    state["content_metadata"] = dict(_METADATA)
    size, has_optimizer = dist.get_world_size(), optimizer is not None
    return state | common_state(config, iteration, world_size=size, has_optimizer=has_optimizer)


def adapter_settings(chunks: list[torch.nn.Module]) -> LoraConfig | None:
    """Return what the chunks' adapters were attached with (:func:`lora.attach`); None for chunks without adapters."""
    found = next((module.lora for module in chunks[0].modules() if hasattr(module, "lora")), None)
    return None if found is None else found.settings


def _loaded(content: bytes, name: str, stored: CheckpointIndex) -> Any:
    try:
        is_common = name.startswith(COMMON_PREFIX)
        found = load_tensors(content, _ALLOWED_IN_COMMON_STATE if is_common else ())
        if is_common:
            _drop_arguments(found)
        if EXTRA_STATE in name:
            _check_extra_states(found)
    except Exception as error:
        raise UserError(
            f"{stored.option}: {name} in {stored.folder} is damaged or holds more than plain data: {error}"
        ) from None
    return found


def _drop_arguments(found: Any) -> None:
    """Remove Megatron-LM's arguments. Megatron-Core would take settings for loading from them."""
    for part in found if isinstance(found, list | tuple) else ():
        if isinstance(part, dict):
            part.pop("args", None)


def _check_extra_states(found: Any) -> None:
    """Refuse pickled bytes that would run code when Transformer Engine unpickles them."""
    if isinstance(found, dict):
        found = list(found.values())
    if isinstance(found, list | tuple):
        for part in found:
            _check_extra_states(part)
    elif isinstance(found, torch.Tensor) and found.dtype == torch.uint8 and found.numel():
        unpickled(found.contiguous().numpy().tobytes(), is_of_a_recipe)


def _fill(chunks: list[torch.nn.Module], state: dict) -> None:
    """Copy the state that :func:`_load` returned into the chunks."""
    with checked_extra_states():
        for index, chunk in enumerate(chunks):
            chunk.load_state_dict(state[f"model{index}"])


def _load(template: dict, folder: Path, key: str) -> dict:
    stored = CheckpointIndex(folder, key)
    absent = {}
    for name in [name for name in template if name != "optimizer"]:
        _check_fit(template[name], stored, key)
        template[name], absent[name] = without_absent_extra_states(template[name], stored.objects)
    try:
        with plain_data_only(stored):
            state = dist_checkpointing.load(template, str(folder))
    except CheckpointingException as error:
        raise UserError(f"{key}: {folder} does not fit this model: {str(error).splitlines()[0]}") from None
    for name, names in absent.items():
        state[name] |= dict.fromkeys(names)
    return state


def _check_fit(state: dict, stored: CheckpointIndex, key: str) -> None:
    for item in state.values():
        shards = nested_values(item.build()) if isinstance(item, ShardedTensorFactory) else [item]
        for shard in shards:
            if not isinstance(shard, ShardedTensor):
                continue
            if shard.key not in stored:
                raise UserError(f"{key}: {stored.folder} lacks tensor {shard.key}; choose another checkpoint")
            found = stored.shape(shard.key)
            if found != tuple(shard.global_shape) and not shard.allow_shape_mismatch:
                raise UserError(
                    f"{key}: tensor {shard.key} in {stored.folder} has shape {list(found)}, this model's has "
                    f"{list(shard.global_shape)}"
                )
