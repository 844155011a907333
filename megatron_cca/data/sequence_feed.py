"""A thread that runs a DALI pipeline of token batches ahead of the training loop."""

from __future__ import annotations

import contextlib
import queue
import threading
import weakref
from collections.abc import Callable

import numpy as np
import torch

from megatron_cca.data.dali import sequence_pipeline


def _stop(stopping: threading.Event, thread: threading.Thread) -> None:
    stopping.set()
    thread.join()


def _run_ahead(pipeline, ready: queue.Queue, stopping: threading.Event) -> None:
    while not stopping.is_set():
        try:
            # A copy: the pipeline's memory is written again on its next run.
            found = torch.from_dlpack(pipeline.run()[0].as_tensor()).long()
        except BaseException as error:
            found = error
        _hand_over(found, ready, stopping)
        if isinstance(found, BaseException):
            return


def _hand_over(found: torch.Tensor | BaseException, ready: queue.Queue, stopping: threading.Event) -> None:
    while not stopping.is_set():
        with contextlib.suppress(queue.Full):
            ready.put(found, timeout=0.1)
            return


class SequenceFeed:
    """Runs ``source(0), source(1), ...`` ahead of their use and hands the arrays over on the device, through DALI.

    DALI calls a Python source in the thread that runs the pipeline; a thread of its own keeps that off the training
    loop.

    Args:
        source: turn -> int32 ``[rows, S]``; S may differ from turn to turn.
        rows: of every array.
        device: where the arrays go.
        depth: so many turns are run ahead.

    Raises:
        UserError: DALI is not installed.
    """

    def __init__(self, source: Callable[[int], np.ndarray], rows: int, device: torch.device, depth: int) -> None:
        self._ready: queue.Queue = queue.Queue(maxsize=depth)
        self._stopping = threading.Event()
        pipeline = sequence_pipeline(source, rows, device)
        # Of a function that does not know this object: a running thread would keep it, and whatever uses it, alive.
        arguments = (pipeline, self._ready, self._stopping)
        thread = threading.Thread(target=_run_ahead, args=arguments, name="token batches", daemon=True)
        thread.start()
        # Also at exit: an interpreter that goes away under a running pipeline aborts.
        self._stop = weakref.finalize(self, _stop, self._stopping, thread)

    def next(self) -> torch.Tensor:
        """The next array, int64 ``[rows, S]``; raises what ``source`` raised for it."""
        found = self._ready.get()
        if isinstance(found, BaseException):
            raise found
        return found

    def close(self) -> None:
        """Stop, and forget what was read ahead."""
        self._stop()
