"""Copies between host and device that overlap with compute; on a CPU they are plain copies."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import psutil
import torch
from torch import Tensor

from megatron_cca import platform

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_device_calls = threading.Lock()


def host_copy(tensor: Tensor) -> Tensor:
    """A copy in host memory, page-locked where there is a GPU, so that it can be copied back while the GPU computes.

    Raises:
        RuntimeError: the driver will not lock so much memory.
    """
    host = torch.empty_like(tensor, device="cpu")
    if platform.current().is_cuda and host.numel():
        _lock_pages(host)
    return host.copy_(tensor)


def _lock_pages(host: Tensor) -> None:
    # Not torch's pinned allocator: it rounds sizes up to powers of two, gigabytes for an embedding.
    cudart, address = torch.cuda.cudart(), host.data_ptr()
    error = int(cudart.cudaHostRegister(address, host.nbytes, 0))
    if error:
        raise RuntimeError(f"cannot lock {host.nbytes} bytes of host memory: CUDA error {error}; see ulimit -l")
    weakref.finalize(host.untyped_storage(), cudart.cudaHostUnregister, address)


class Fetcher:
    """Copies tensors to the device beside the compute queue, in the order asked for."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream() if platform.current().is_cuda else None

    def start(self, host: Sequence[Tensor]) -> Arriving:
        """Begin to copy; what the compute queue holds already may still be running, what comes later must wait."""
        arrived = [torch.empty_like(tensor, device=platform.device()) for tensor in host]
        if self._stream is None:
            for ours, theirs in zip(arrived, host, strict=True):
                ours.copy_(theirs)
            return Arriving(arrived, None)
        # The memory may have been another layer's a moment ago: its last use must be over.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for ours, theirs in zip(arrived, host, strict=True):
                ours.copy_(theirs, non_blocking=True)
        return Arriving(arrived, self._stream.record_event())


class Arriving:
    """Device tensors that a :class:`Fetcher` is filling."""

    def __init__(self, tensors: list[Tensor], event) -> None:
        self._tensors, self._event = tensors, event

    def wait(self) -> list[Tensor]:
        """The tensors, for use by what is queued from now on; also to be called before they are dropped unused.

        Their memory goes back to the compute queue's pool, which must not write into it before the copy is done.
        """
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)
        return self._tensors


class SideQueue:
    """Device work of a thread that does not compute, beside the compute queue; on a CPU it is done at once.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = _side_stream(device) if device.type == "cuda" else None

    @contextmanager
    def finished(self) -> Iterator[None]:
        """Queue the device work of a block here, and wait at its end until that is done.

        What the block has read may be written again thereafter, and any thread may use what it has made. The compute
        queue is not waited for.
        """
        if self._stream is None:
            yield
            return
        # The stream's device also becomes the thread's, whose own would be the machine's first GPU.
        with _device_calls, torch.cuda.stream(self._stream):
            yield
            self._stream.synchronize()


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    # One for all: torch has 32, and would hand out again what others hold.
    return torch.cuda.Stream(device)


@contextmanager
def without_side_work() -> Iterator[None]:
    """Keep the blocks of every :class:`SideQueue` waiting.

    For a graph capture in CUDA's mode "global": it fails where another thread allocates or waits meanwhile.
    """
    with _device_calls:
        yield


def used_here(tensor: Tensor) -> Tensor:
    """The tensor, whose memory then is not given to others before what this thread has queued so far and later is done.

    To be called by whoever takes a tensor that a :class:`SideQueue` has allocated.
    """
    if tensor.is_cuda:
        tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return tensor


def host_buffer(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised host memory for ``count`` numbers, page-locked if they are to be copied to a GPU."""
    return torch.empty(count, dtype=dtype, pin_memory=device.type == "cuda")


def available_host_bytes() -> int:
    """Host memory that this machine's processes can still take, within the control group's limit."""
    available = psutil.virtual_memory().available
    for path in map(Path, _CGROUP_LIMITS):
        text = path.read_text().strip() if path.is_file() else "max"
        if text.isdigit():
            available = min(available, int(text) - _cgroup_usage(path))
    return max(0, available)


def _cgroup_usage(limit: Path) -> int:
    usage = limit.with_name({"memory.max": "memory.current"}.get(limit.name, "memory.usage_in_bytes"))
    return int(usage.read_text())


def local_world_size() -> int:
    """Processes of this job on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
