"""Lets Megatron read a checkpoint's pickles only where they hold plain data.

Megatron-Core 0.19 reads tensors by ``torch.load`` with ``weights_only``. Of the rest it reads the index ``.metadata``
by ``pickle.load``, what is no tensor (its ``common_state``, the layers' extra states, the optimizer's objects) by
``torch.load`` with ``weights_only=False``, and a ``common.pt``, which only its older versions wrote, by a list that
has numpy's trusting functions on it. Transformer Engine unpickles the bytes of the layers' extra states once more.
"""

from __future__ import annotations

import io
import os
import threading
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.safe_globals import SafeUnpickler
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from megatron_cca.checkpoint.megatron_lm import EXTRA_STATE
from megatron_cca.checkpoint.stored_tensors import StoredTensors
from megatron_cca.errors import UserError
from megatron_cca.io.pickles import load_tensors, unpickled

_ONE_AT_A_TIME = threading.Lock()
_COMMON_STATE = "common_state"
# Transformer Engine 2.16 and later unpickle the extra states of FP8's delayed scaling only where it is 1.
_TE_MAY_UNPICKLE = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
# Megatron-LM's way of keeping its arguments: a dictionary with dots.
_ALLOWED_IN_COMMON_STATE = [(Namespace, "argparse.Namespace")]


@contextmanager
def plain_data_only(stored: StoredTensors) -> Iterator[None]:
    """Within the block, whatever Megatron reads of a checkpoint runs no code.

    Args:
        stored: the checkpoint, whose index has been read and checked.

    Raises:
        UserError: a ``common.pt``; from the block, a damaged file or one that holds more than plain data; names it.
    """
    if (stored.folder / COMMON_STATE_FNAME).exists():
        raise UserError(
            f"{stored.option}: {stored.folder / COMMON_STATE_FNAME} is a pickle of an older Megatron, which is not "
            "read; choose another checkpoint"
        )

    def read_metadata(reader: FileSystemReader, *_: Any, **__: Any) -> Metadata:
        assert reader.path == stored.folder, f"{reader.path} is read, not {stored.folder}"
        if stored.index.storage_meta is None:
            stored.index.storage_meta = StorageMeta()
        stored.index.storage_meta.load_id = reader.load_id
        return stored.index

    def load_bytes(planner: DefaultLoadPlanner, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        found = _loaded(value.getvalue(), name, stored)
        if planner.flatten_state_dict:
            set_element(planner.original_state_dict, planner.mappings[name], found)
        else:
            planner.state_dict[name] = found

    with (
        _ONE_AT_A_TIME,
        patch.object(FileSystemReader, "read_metadata", read_metadata),
        patch.object(DefaultLoadPlanner, "load_bytes", load_bytes),
    ):
        try:
            yield
        except CheckpointException as error:
            # torch's, by rank, of which there is one; it is no Exception.
            cause = next(iter(error.failures.values()))[0]
            if isinstance(cause, UserError):
                raise cause from None
            why = (str(cause).splitlines() or [type(cause).__name__])[0]
            raise UserError(f"{stored.option}: {stored.folder} cannot be read, a file is damaged: {why}") from None


@contextmanager
def checked_extra_states() -> Iterator[None]:
    """Within the block, Transformer Engine takes pickled extra states of layers.

    Only for those that were read under :func:`plain_data_only`, which has refused what would run anything. The
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


def _loaded(content: bytes, name: str, stored: StoredTensors) -> Any:
    try:
        is_common = name.startswith(_COMMON_STATE)
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
    """Leave out what only Megatron-LM reads: Megatron-Core would also take its way of loading from it."""
    for part in found if isinstance(found, list | tuple) else ():
        if isinstance(part, dict):
            part.pop("args", None)


def _check_extra_states(found: Any) -> None:
    """Refuse bytes that Transformer Engine could not unpickle without running anything."""
    if isinstance(found, dict):
        found = list(found.values())
    if isinstance(found, list | tuple):
        for part in found:
            _check_extra_states(part)
    elif isinstance(found, torch.Tensor) and found.dtype == torch.uint8 and found.numel():
        unpickled(found.contiguous().numpy().tobytes(), _is_of_a_recipe)


def _is_of_a_recipe(module: str, name: str) -> bool:
    return module.partition(".")[0] != "numpy" and (module, name) in SafeUnpickler._SAFE_CLASSES
