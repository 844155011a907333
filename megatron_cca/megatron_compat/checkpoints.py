"""Corrections of how Megatron-Core 0.19.2 saves and loads distributed checkpoints.

- Extra states: Transformer Engine's layers keep FP8 scales in them. Local layers keep nothing. Both accept None, which
  means default values. Plain Megatron refuses a checkpoint without them. Transformer Engine 2.11 to 2.19 pickles the
  scales. From 2.16 on it refuses to unpickle them.
- Reading: Megatron-Core uses torch's ``FileSystemReader.read_metadata`` for the index ``.metadata``, and
  ``DefaultLoadPlanner.load_bytes`` for objects that are not tensors. Both unpickle anything.
  ``dist_checkpointing.load`` does not accept other classes.
- Writing: Megatron-Core's writer sends its results through a queue in a server process. It reports that a file was not
  written, but not why. After some errors one rank raises while the others wait.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.safe_globals import SafeUnpickler
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from megatron_cca.megatron_compat import EXTRA_STATE, FINAL_NORM, HEAD_NORMS

# Transformer Engine 2.16 and later unpickle the extra states of FP8 delayed scaling only if this variable is 1.
_TE_MAY_UNPICKLE = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
_ONE_AT_A_TIME = threading.Lock()


def with_all_extra_states(state: dict) -> dict:
    """Return a chunk's sharded state with all extra states that plain layers of either kind load."""
    lacking = {}
    for name, weight in state.items():
        norm = name.removesuffix(".weight")
        if norm != name and norm.endswith((FINAL_NORM, *HEAD_NORMS)):
            # Layers are stacked along the first axis.
            places = weight.global_shape[:-1] or (1,), weight.global_offset[:-1] or (0,)
            key = weight.key.removesuffix("weight") + EXTRA_STATE
            lacking[f"{norm}.{EXTRA_STATE}"] = ShardedObject(key, None, *places, weight.replica_id)
    return lacking | state


def without_empty_extra_states(state: dict) -> dict:
    """Return a chunk's sharded state without the extra states that are empty.

    LoRA runs are saved like this. Otherwise a plain GPTModel would load the weights and silently ignore the adapters.
    Without the extra states, Megatron reports a missing key.
    """
    return {name: item for name, item in state.items() if not (_is_extra_state(item) and _is_empty(item.data))}


def without_absent_extra_states(state: dict, stored: Collection[str]) -> tuple[dict, list[str]]:
    """Return a chunk's sharded state without the extra states that a checkpoint lacks, and their names.

    Args:
        state: sharded state of the chunk.
        stored: Megatron's unique keys of the objects in the checkpoint that are not tensors.
    """
    absent = [name for name, item in state.items() if _is_extra_state(item) and item.unique_key not in stored]
    return {name: item for name, item in state.items() if name not in absent}, absent


@contextmanager
def checked_extra_states() -> Iterator[None]:
    """Let Transformer Engine unpickle the extra states of layers within the block. Then restore the environment.

    Use it only for states that were read with ``checkpoint.safe_pickle``, which refuses pickles that run code.
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
    """Return whether a pickled extra state can name this class. Allows Megatron-Core's list, except numpy."""
    return module.partition(".")[0] != "numpy" and (module, name) in SafeUnpickler._SAFE_CLASSES


@contextmanager
def replaced_reading(folder: Path, index: Metadata, load: Callable[[bytes, str], Any]) -> Iterator[None]:
    """Prevent Megatron-Core from unpickling anything of a checkpoint itself within the block.

    Args:
        folder: folder of the checkpoint. No other checkpoint can be read within the block.
        index: the content of its ``.metadata``.
        load: unpickles an object. It gets the bytes and the unique key of the object.
    """

    def read_metadata(reader: FileSystemReader, *_: Any, **__: Any) -> Metadata:
        assert reader.path == folder, f"{reader.path} is read, not {folder}"
        if index.storage_meta is None:
            index.storage_meta = StorageMeta()
        index.storage_meta.load_id = reader.load_id
        return index

    def load_bytes(planner: DefaultLoadPlanner, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        found = load(value.getvalue(), name)
        if planner.flatten_state_dict:
            set_element(planner.original_state_dict, planner.mappings[name], found)
        else:
            planner.state_dict[name] = found

    with (
        _ONE_AT_A_TIME,
        patch.object(FileSystemReader, "read_metadata", read_metadata),
        patch.object(DefaultLoadPlanner, "load_bytes", load_bytes),
    ):
        yield


class Strategy(TorchDistSaveShardedStrategy):
    """Megatron's save strategy, except that an index that cannot be written is recorded in :attr:`problem`.

    Megatron's own would raise on rank 0 while the other ranks wait.

    Args:
        described: returns the message of an error in one line.
    """

    def __init__(self, described: Callable[[BaseException], str]) -> None:
        super().__init__()
        self._described = described
        self.problem: str | None = None
        """Why the index could not be written. None if it was."""

    def _get_save_and_finalize_callbacks(self, writer, *arguments) -> AsyncRequest:
        finish = writer.finish

        def finish_or_tell(metadata, results) -> None:
            try:
                finish(metadata, results)
            except OSError as error:
                self.problem = self._described(error)

        writer.finish = finish_or_tell
        return super()._get_save_and_finalize_callbacks(writer, *arguments)


def write_request(state: dict, folder: Path, strategy: Strategy, results: Any) -> AsyncRequest:
    """Return Megatron-Core's request to write a sharded state. Collective over all ranks.

    The request does not write the file that marks the format, see :func:`mark_format`. If Megatron-Core could not write
    it, rank 0 would raise while the other ranks wait.

    Args:
        state: a sharded state for ``dist_checkpointing.save``.
        folder: an existing, empty folder.
        strategy: the strategy of this save.
        results: a queue for the writer's results. It needs only ``put`` and ``get_nowait``.
    """
    filesystem_async._results_queue = results
    request = dist_checkpointing.save(state, str(folder), strategy, async_sharded_save=True, async_strategy="mcore")
    request.finalize_fns.pop()
    return request


def write_at_once(request: AsyncRequest) -> AsyncRequest:
    """Write the files in this process, and return the request without this part.

    Megatron's ``execute_sync`` would also finalise the save.
    """
    arguments = list(request.async_fn_args)
    if request.async_fn is not None:
        arguments[1] = request.preload_fn()
        request.async_fn(*arguments)
    return request._replace(async_fn=None)


def mark_format(folder: Path, strategy: Strategy) -> None:
    """Write the file by which Megatron-Core recognises the format.

    Raises:
        OSError: from the file system.
    """
    save_config(CheckpointingConfig(strategy.backend, strategy.version), str(folder))


@contextmanager
def watched_writes(failed: Callable[[Exception], None]) -> Iterator[None]:
    """Call ``failed`` with each error of Megatron-Core's writer within the block."""
    write = FileSystemWriterAsync.write_preloaded_data

    def watched(*arguments, **options):
        outcome = write(*arguments, **options)
        if isinstance(outcome[1], Exception):
            failed(outcome[1])
        return outcome

    FileSystemWriterAsync.write_preloaded_data = staticmethod(watched)
    try:
        yield
    finally:
        FileSystemWriterAsync.write_preloaded_data = staticmethod(write)


def _is_extra_state(item: object) -> bool:
    return isinstance(item, ShardedObject) and item.key.endswith(EXTRA_STATE)


def _is_empty(extra_state: object) -> bool:
    return extra_state is None or (isinstance(extra_state, torch.Tensor) and not extra_state.numel())
