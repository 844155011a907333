"""Device work of other threads beside the compute queue. On a CPU it runs at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

_device_calls = threading.Lock()


class SideQueue:
    """A queue for device work of another thread, beside the compute queue. On a CPU the work runs immediately.

    Args:
        device: the device of the work.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = _side_stream(device) if device.type == "cuda" else None

    @contextmanager
    def finished(self) -> Iterator[None]:
        """Queue the device work of the block here, and wait at its end until the work is done.

        After the block, its inputs can be overwritten, and any thread can use its results. The compute queue is not
        waited for.
        """
        if self._stream is None:
            yield
            return
        # This also sets the thread's current device. It would otherwise be the first GPU.
        with _device_calls, torch.cuda.stream(self._stream):
            yield
            self._stream.synchronize()


@contextmanager
def without_side_work() -> Iterator[None]:
    """Block every :class:`SideQueue` during this block.

    A CUDA graph capture in mode "global" needs this. It fails if another thread allocates or waits at the same time.
    """
    with _device_calls:
        yield


def used_here(tensor: Tensor) -> Tensor:
    """Mark a tensor as used by this thread's queue, and return it.

    Call it for every tensor that a :class:`SideQueue` has allocated. After the tensor is dropped, its memory is then
    reused only when this thread's queued work is done.
    """
    if tensor.is_cuda:
        tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return tensor


def host_buffer(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return uninitialised host memory for ``count`` numbers. It is page-locked if ``device`` is a GPU."""
    return torch.empty(count, dtype=dtype, pin_memory=device.type == "cuda")


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    # All side queues of a device share one stream. torch has only 32, and would give out a stream that is in use.
    return torch.cuda.Stream(device)
