"""Save checkpoints during training, one at a time, each whole or not at all. A forked process can do the writing."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import pickle
import queue
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from torch.distributed.checkpoint.api import CheckpointException

from megatron_cca import platform
from megatron_cca.checkpoint import layout
from megatron_cca.checkpoint.distributed import state_to_save
from megatron_cca.checkpoint.layout import file_system_cause
from megatron_cca.config.load import config_from_dict
from megatron_cca.errors import UserError
from megatron_cca.megatron_compat.checkpoints import (
    Strategy,
    mark_format,
    watched_writes,
    write_at_once,
    write_request,
)
from megatron_cca.parallel.ranks import all_finite, attempted_on_rank_0, described, first_problem
from megatron_cca.terminal import STOPPING

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Written:
    """The result of a rank's writer, besides Megatron's own results.

    Attributes:
        checksums: checksums of the files that it wrote, by name.
        problem: why it could not write, in one line. None if it could.
    """

    checksums: dict[str, str]
    problem: str | None


class ResultsFile:
    """The results of Megatron's writer process, in a file in memory that parent and forked child share.

    It replaces Megatron's server process, which outlives a killed rank and takes seconds to import torch.
    """

    def __init__(self) -> None:
        # A file object closes itself when this object is deleted. A run saves many times.
        self._file = os.fdopen(os.memfd_create("checkpoint_results"), "r+b", buffering=0)
        self._read = 0

    def put(self, item: object) -> None:
        """Append an item."""
        data = pickle.dumps(item)
        rest = memoryview(len(data).to_bytes(8, "little") + data)
        while rest:
            rest = rest[self._file.write(rest) :]

    def get_nowait(self) -> object:
        """Return the next item.

        Raises:
            queue.Empty: there is no further item.
        """
        size = int.from_bytes(os.pread(self._file.fileno(), 8, self._read), "little")
        data = os.pread(self._file.fileno(), size, self._read + 8)
        if not size or len(data) < size:
            raise queue.Empty
        self._read += 8 + size
        # The data come from this rank's own forked child, through memory that no other process can open.
        return pickle.loads(data)  # noqa: S301


def writes_in_background(wanted: bool | None) -> bool:
    """Return whether a forked process writes while training goes on.

    Args:
        wanted: ``training.async_save``. None means true on a CPU and false on CUDA, which does not support a fork
            after its start.
    """
    return not platform.current().is_cuda if wanted is None else wanted


def hashing(request: AsyncRequest, folder: Path, results: ResultsFile, *, in_background: bool) -> AsyncRequest:
    """Return the request extended to also hash this rank's files and put a :class:`Written` into ``results``."""
    if request.async_fn is None:
        return request
    write = functools.partial(_write, request.async_fn, folder, dist.get_rank(), results, os.getpid(), in_background)
    return request._replace(async_fn=write)


@dataclass(frozen=True)
class Saved:
    """The outcome of a save.

    Attributes:
        iteration: iteration of the checkpoint.
        problem: why the checkpoint was not saved, in one line. None if it was.
        removed: iterations that were removed afterwards (``keep_last``, ``keep_every``).
        seconds: time from the call of ``save`` to the end.
        waited_seconds: the part of it during which training waited.
    """

    iteration: int
    problem: str | None
    removed: tuple[int, ...] = ()
    seconds: float = 0.0
    waited_seconds: float = 0.0


class CheckpointSaver:
    """Writer of a run's checkpoints. All methods are collective over all ranks.

    A save that fails leaves no files, and does not change earlier checkpoints.

    Args:
        root: the run's ``checkpoints`` folder.
        start: the checkpoint that training started from. Its files from Hugging Face go into each checkpoint.
        in_background: whether another process writes while training goes on.
        keep_last, keep_every: see :func:`layout.prune`.
    """

    def __init__(
        self,
        root: Path,
        *,
        start: Path | None = None,
        in_background: bool = False,
        keep_last: int | None = None,
        keep_every: int | None = None,
    ) -> None:
        self._root, self._start, self._in_background = root, start, in_background
        self._keep = keep_last, keep_every
        self._queue = AsyncCallsQueue()
        self._pending: _Pending | None = None
        self.last_saved: int | None = None
        """Iteration of the newest checkpoint that this run has saved or continued from."""

    def save(self, iteration: int, chunks: list[torch.nn.Module], optimizer, summary: dict) -> list[Saved]:
        """Begin to write model and optimizer. Waits for the previous save, and for this one unless in the background.

        Args:
            iteration: number of completed steps.
            chunks: this rank's model chunks, without DDP.
            optimizer: Megatron's optimizer, or None.
            summary: from :func:`summarize`, to keep in ``checkpoint.json``.

        Returns:
            The saves that ended during this call.
        """
        ended = self.finish()
        started = time.perf_counter()
        partial = layout.partial_folder(self._root, iteration)
        state = state_to_save(chunks, optimizer, config_from_dict(summary["config"]), iteration)
        problem = first_problem(_not_finite(state)) or attempted_on_rank_0(lambda: _make_empty(partial))[1]
        if problem is not None:
            return [*ended, Saved(iteration, problem)]
        self._pending = _Pending(iteration, summary, partial, ResultsFile(), Strategy(described), started)
        self._begin(self._request(state, self._pending))
        self._pending.waited = time.perf_counter() - started
        return ended if self._in_background else [*ended, *self.finish()]

    def _request(self, state: dict, pending: _Pending) -> AsyncRequest:
        request = write_request(state, pending.partial, pending.strategy, pending.results)
        pending.writes = request.async_fn is not None
        return hashing(request, pending.partial, pending.results, in_background=self._in_background)

    def _begin(self, request) -> None:
        if self._in_background:
            self._queue.schedule_async_request(request)
            return
        # If a rank fails, _end tells all ranks.
        self._queue.schedule_async_request(write_at_once(request))

    @property
    def is_writing(self) -> bool:
        """Whether a save has begun and not ended."""
        return self._pending is not None

    def poll(self) -> list[Saved]:
        """Return the save that has ended since the last call, if any. Does not wait."""
        return self._end(blocking=False)

    def finish(self) -> list[Saved]:
        """Wait until the current save ends, and return it."""
        return self._end(blocking=True)

    def _end(self, *, blocking: bool) -> list[Saved]:
        pending = self._pending
        if pending is None:
            return []
        begun = time.perf_counter()
        try:
            if not self._queue.maybe_finalize_async_calls(blocking=blocking):
                pending.waited += time.perf_counter() - begun
                return []
            problem = pending.strategy.problem
        except CheckpointException as error:
            problem = _why(error)
        self._pending = None
        written = _written(pending)
        problem = first_problem(written.problem) or first_problem(problem)
        removed, problem = self._conclude(pending, written.checksums, problem)
        if problem is None:
            self.last_saved = pending.iteration
        now = time.perf_counter()
        waited = pending.waited + now - begun
        return [Saved(pending.iteration, problem, tuple(removed or ()), now - pending.started, waited)]

    def _conclude(
        self, pending: _Pending, checksums: dict[str, str], problem: str | None
    ) -> tuple[list[int] | None, str | None]:
        removed = None
        if problem is None:
            everyone: list | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
            dist.gather_object(checksums, everyone)
            problem = attempted_on_rank_0(lambda: self._finalize(pending, everyone))[1]
        if problem is None:
            # The save has succeeded, even if old checkpoints cannot be removed.
            removed = attempted_on_rank_0(lambda: layout.prune(self._root, pending.iteration, *self._keep))[0]
        else:
            attempted_on_rank_0(lambda: shutil.rmtree(pending.partial, ignore_errors=True))
        return removed, problem

    def _finalize(self, pending: _Pending, everyone: list[dict[str, str]]) -> None:
        known = {name: found for sums in everyone for name, found in sums.items()}
        mark_format(pending.partial, pending.strategy)
        known |= layout.keep_companions(self._root, self._start, pending.partial)
        layout.finalize(pending.partial, self._root, pending.iteration, pending.summary, known)


def save(
    root: Path, iteration: int, chunks: list[torch.nn.Module], optimizer, summary: dict, start: Path | None = None
) -> None:
    """Save one checkpoint and wait for it, see :class:`CheckpointSaver`. Collective over all ranks.

    Raises:
        UserError: the checkpoint could not be written.
    """
    for saved in CheckpointSaver(root, start=start).save(iteration, chunks, optimizer, summary):
        if saved.problem is not None:
            raise UserError(f"{layout.iteration_folder(root, iteration)}: not saved: {saved.problem}")


def _write(
    write: Callable, folder: Path, rank: int, results: ResultsFile, parent: int, in_background: bool, *arguments
) -> None:
    if in_background:
        _die_with(parent)
    problems: list[str] = []
    # Megatron's writer reports a failure without its cause.
    with watched_writes(lambda error: problems.append(described(file_system_cause(error)))):
        write(*arguments)
    checksums = {}
    try:
        checksums = layout.checksums(folder, [path.name for path in folder.glob(f"__{rank}_*.distcp")])
    except OSError as error:
        problems.append(described(error))
    results.put(Written(checksums, next(iter(problems), None)))


def _die_with(parent: int) -> None:
    """End this process when its rank is killed, so that it cannot write into the folder of the next attempt."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    for number in STOPPING:
        # The signals go to the whole job. The rank handles them, and waits for this process.
        signal.signal(number, signal.SIG_IGN)


@dataclass
class _Pending:
    iteration: int
    summary: dict
    partial: Path
    results: ResultsFile
    strategy: Strategy
    started: float
    writes: bool = False
    waited: float = 0.0


def _make_empty(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def _not_finite(state: dict) -> str | None:
    """Return one line that names a tensor of this rank with NaN or infinity. None if all are finite."""
    for item in nested_values(state):
        if not isinstance(item, ShardedTensor | ShardedTensorFactory) or not torch.is_tensor(item.data):
            continue
        if item.data.is_floating_point() and not all_finite(item.data):
            return f"{item.key} holds NaN or infinity"
    return None


def _why(error: CheckpointException) -> str:
    causes = [failure[0] if isinstance(failure, tuple) else failure for failure in error.failures.values()]
    return described(causes[0]) if causes else "another rank could not write its part"


def _written(pending: _Pending) -> Written:
    """Return the result of this rank's writer."""
    with contextlib.suppress(queue.Empty):
        while True:
            found = pending.results.get_nowait()
            if isinstance(found, Written):
                return found
    return Written({}, f"the writing process of rank {dist.get_rank()} was killed" if pending.writes else None)
