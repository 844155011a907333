"""Load the batches of a rank ahead of their use, in a thread, and copy them to the device."""

from __future__ import annotations

import contextlib
import queue
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cca.data import dali
from megatron_cca.data.microbatches import BatchBuilder, StepBatch, StepPlan
from megatron_cca.errors import UserError, error_context
from megatron_cca.parallel.ranks import described
from megatron_cca.platform.transfers import SideQueue, host_buffer, used_here

DALI, TORCH = "dali", "torch"
# Copies int32 [rows, S] from host memory to the device or to page-locked memory. Valid until the next call.
Stage = Callable[[np.ndarray], Tensor]


def loader_in_force(wanted: str | None) -> str:
    """Return the library that copies batches to the device: ``wanted`` or, if that is None, DALI where it is installed.

    Raises:
        UserError: DALI is wanted and not installed.
    """
    is_installed = wanted != TORCH and dali.is_installed()
    if wanted == DALI and not is_installed:
        raise UserError(
            f"data.loader: {DALI} is not installed here; pip install 'megatron-cca[data]', or set it to {TORCH}"
        )
    return DALI if is_installed else TORCH


class SequenceFeed:
    """A feed that calls ``source(0), source(1), ...`` ahead of their use and returns the arrays on the device.

    The calls run in a thread beside the training loop. The copies run in a queue beside the computation on the device.

    Args:
        source: called with the turn, returns a dense int32 ``[rows, S]``. S may differ between turns. Memory may be
            reused.
        rows: of every array.
        device: of the results.
        depth: how many turns are run ahead.
        loader: the library that copies them, see :func:`loader_in_force`.

    Raises:
        UserError: DALI is wanted and not installed, or does not start.
    """

    def __init__(
        self,
        source: Callable[[int], np.ndarray],
        rows: int,
        device: torch.device,
        depth: int,
        loader: str | None = None,
    ) -> None:
        self._ready: queue.Queue = queue.Queue(maxsize=depth)
        self._stopping = threading.Event()
        move = _mover(_stage(loader_in_force(loader), rows, device), device)
        # The thread's function must not refer to this object: a running thread would keep it and its users alive.
        arguments = (source, move, self._ready, self._stopping)
        thread = threading.Thread(target=_run_ahead, args=arguments, name="token batches", daemon=True)
        thread.start()
        # Also at exit: an interpreter that ends under a running pipeline aborts.
        self._stop = weakref.finalize(self, _stop, self._stopping, thread)

    def next(self) -> Tensor:
        """Return the next array, int64 ``[rows, S]``. Raises what ``source`` raised for it."""
        found = self._ready.get()
        if isinstance(found, BaseException):
            raise found
        return used_here(found)

    def close(self) -> None:
        """Stop, and drop what was read ahead."""
        self._stop()


@dataclass(frozen=True)
class RankShare:
    """The part of a global batch that a rank reads and uses.

    Attributes:
        data_parallel_rank, data_parallel_size: which share of a global batch is this rank's.
        needs_tokens: whether it holds the first or the last layers. Other ranks work on hidden states alone.
        group: ranks that need the same tokens (tensor and context parallel). Its first rank reads them for all. None
            means this rank alone.
    """

    data_parallel_rank: int = 0
    data_parallel_size: int = 1
    needs_tokens: bool = True
    group: dist.ProcessGroup | None = None

    @property
    def reads(self) -> bool:
        """Whether this rank reads from disk."""
        return self.needs_tokens and (self.group is None or dist.get_group_rank(self.group, dist.get_rank()) == 0)


class BatchLoader:
    """A loader of a rank's batches, step by step, prefetched and on its device.

    Args:
        batches: builds the batches.
        share: this rank's.
        device: where the tokens go.
        prefetch: how many steps are read ahead.
        loader: the value of ``data.loader``, see :func:`~megatron_cca.data.loader.loader_in_force`.
    """

    def __init__(
        self, batches: BatchBuilder, share: RankShare, device: torch.device, prefetch: int, loader: str | None = None
    ) -> None:
        self._batches, self._share, self._device, self._prefetch = batches, share, device, prefetch
        self._wanted = loader
        self._feed: SequenceFeed | None = None
        self._plans: dict[int, StepPlan] = {}
        self._next_step: int | None = None

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def reads(self) -> bool:
        """Whether this rank reads from disk. Other ranks receive the tokens, or need none."""
        return self._share.reads

    @cached_property
    def loader(self) -> str | None:
        """The library that copies batches to the device, ``dali`` or ``torch``. None where this rank reads nothing.

        Raises:
            UserError: DALI is wanted and not installed.
        """
        # This imports DALI, which takes a second.
        return loader_in_force(self._wanted) if self._share.reads else None

    def start(self, step: int) -> None:
        """Begin to read ahead for this step. :meth:`get` does so by itself, but its first call then has to wait."""
        if not self._share.reads:
            return
        self.close()
        share, batches, plans = self._share, self._batches, self._plans

        # The function must not refer to this object: the calling thread would keep it and its process groups alive.
        def sequences(turn: int) -> np.ndarray:
            plans[step + turn] = plan = batches.plan(step + turn)
            return batches.sequences(plan, share.data_parallel_rank, share.data_parallel_size)

        rows = batches.rows_per_rank(share.data_parallel_size)
        self._feed = SequenceFeed(sequences, rows, self._device, self._prefetch, self.loader)
        self._next_step = step

    def get(self, step: int) -> StepBatch:
        """Return the batch of a step. Steps in order are fastest. Collective over the share's group.

        Raises:
            UserError: as :meth:`BatchBuilder.plan` and :meth:`BatchBuilder.sequences` do.
        """
        return self._get(step, self._read(step) if self._share.reads else None)

    def attempt(self, step: int) -> tuple[StepBatch, str | None]:
        """Return the batch of a step, or the reason why it could not be read, where :meth:`get` would raise.

        It is for ranks that have to fail together.

        Returns:
            The batch, and why this rank could not read it, in one line. A batch that was not read holds zeros and must
            not be used. The loader cannot be used afterwards.
        """
        try:
            return self.get(step), None
        except (UserError, OSError) as error:
            problem = described(error)
        plan = self._plans.setdefault(step, self._batches.plan(step))
        return self._get(step, self._room_for(plan).zero_() if self._share.reads else None), problem

    def _get(self, step: int, ids: Tensor | None) -> StepBatch:
        share = self._share
        plan = self._plans.pop(step) if share.reads else self._batches.plan(step)
        if share.needs_tokens:
            ids = self._shared(plan, ids)
        return self._batches.assemble(plan, ids, share.data_parallel_rank, share.data_parallel_size, self._device)

    def close(self) -> None:
        """Stop reading ahead."""
        if self._feed is not None:
            self._feed.close()
        self._feed = None
        self._plans.clear()

    def _shared(self, plan: StepPlan, ids: Tensor | None) -> Tensor:
        if ids is None:
            ids = self._room_for(plan)
        group = self._share.group
        if group is not None and group.size() > 1:
            dist.broadcast(ids, src=dist.get_global_rank(group, 0), group=group)
        return ids

    def _room_for(self, plan: StepPlan) -> Tensor:
        rows = self._batches.rows_per_rank(self._share.data_parallel_size)
        return torch.empty(rows, plan.seq_length + 1, dtype=torch.int64, device=self._device)

    def _read(self, step: int) -> Tensor:
        if self._feed is None or step != self._next_step:
            self.start(step)
        self._next_step = step + 1
        return self._feed.next()


def _stage(loader: str, rows: int, device: torch.device) -> Stage:
    if loader == DALI:
        with error_context("data.loader"):
            return dali.sequence_stage(rows, device)
    return torch.from_numpy if device.type == "cpu" else _LockedStage(device)


class _LockedStage:
    """A single page-locked buffer, from which a GPU copies without waiting."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._memory = device, host_buffer(0, torch.int32, device)

    def __call__(self, array: np.ndarray) -> Tensor:
        if self._memory.numel() < array.size:
            self._memory = host_buffer(array.size, torch.int32, self._device)
        return self._memory[: array.size].view(array.shape).copy_(torch.from_numpy(array))


def _stop(stopping: threading.Event, thread: threading.Thread) -> None:
    stopping.set()
    thread.join()


def _run_ahead(
    source: Callable[[int], np.ndarray],
    move: Callable[[np.ndarray], Tensor],
    ready: queue.Queue,
    stopping: threading.Event,
) -> None:
    turn = 0
    while not stopping.is_set():
        try:
            found = move(source(turn))
        except BaseException as error:
            found = error
        _hand_over(found, ready, stopping)
        if isinstance(found, BaseException):
            return
        turn += 1


def _mover(stage: Stage, device: torch.device) -> Callable[[np.ndarray], Tensor]:
    work = SideQueue(device)

    def move(array: np.ndarray) -> Tensor:
        with work.finished():
            # ``staged`` lives until the copy is done: its memory may be overwritten when it is deleted.
            staged = stage(array)
            ids = staged.to(device, non_blocking=True).long()
        return ids

    return move


def _hand_over(found: Tensor | BaseException, ready: queue.Queue, stopping: threading.Event) -> None:
    while not stopping.is_set():
        with contextlib.suppress(queue.Full):
            ready.put(found, timeout=0.1)
            return
