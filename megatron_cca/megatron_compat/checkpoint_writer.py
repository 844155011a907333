"""Megatron-Core 0.19.2's asynchronous writer of checkpoints, with errors that every rank hears of.

Its writer answers through a queue that a server process keeps, says that a file was not written but not why, and lets
one rank raise while the others wait.
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
    """Megatron's own, but for an index that cannot be written: rank 0 would raise and the others wait for it.

    Args:
        described: says in one line what is wrong with an error.
    """

    def __init__(self, described: Callable[[BaseException], str]) -> None:
        super().__init__()
        self._described = described
        self.problem: str | None = None
        """Why the index could not be written; None if it could."""

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
    """Ask Megatron-Core for what is to be done to write a sharded state; collective over all ranks.

    The format is not marked: Megatron-Core would do it on rank 0 while the others wait, whether it can or not.

    Args:
        state: as ``dist_checkpointing.save`` wants it.
        folder: exists and is empty.
        strategy: of this save.
        results: takes what the writer says; has ``put`` and ``get_nowait`` of a queue.
    """
    filesystem_async._results_queue = results
    request = dist_checkpointing.save(state, str(folder), strategy, async_sharded_save=True, async_strategy="mcore")
    request.finalize_fns.pop()
    return request


def write_at_once(request: AsyncRequest) -> AsyncRequest:
    """Write in this process, and return what is left to be done.

    As Megatron's ``execute_sync``, but that what comes after the writing is still to be done.
    """
    arguments = list(request.async_fn_args)
    if request.async_fn is not None:
        arguments[1] = request.preload_fn()
        request.async_fn(*arguments)
    return request._replace(async_fn=None)


def mark_format(folder: Path, strategy: Strategy) -> None:
    """Write the file by which Megatron-Core knows the format; raises what the file system raises."""
    save_config(CheckpointingConfig(strategy.backend, strategy.version), str(folder))


@contextmanager
def watched_writes(failed: Callable[[Exception], None]) -> Iterator[None]:
    """Within the block, call ``failed`` with each error that Megatron-Core's writer meets."""
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
