"""Megatron-Core 0.19.2's asynchronous checkpoint writer, changed so that every rank learns of errors.

The unchanged writer sends its results through a queue in a server process. It reports that a file was not written, but
not why. After some errors one rank raises while the others wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy


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
