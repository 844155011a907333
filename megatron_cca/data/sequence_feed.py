"""Read token batches ahead of the training loop in a thread, and copy them to the device."""

from __future__ import annotations

import contextlib
import queue
import threading
import weakref
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from megatron_cca.data import dali
from megatron_cca.errors import UserError, error_context
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
        raise UserError(f"data.loader: {DALI} is not installed here; pip install -e '.[data]', or set it to {TORCH}")
    return DALI if is_installed else TORCH


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
