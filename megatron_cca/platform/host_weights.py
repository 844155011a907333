"""Weights that wait in host memory: room for them, and copies that overlap with compute.

On a CPU the copies are plain ones.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from torch import Tensor

from megatron_cca import platform

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def host_copy(tensor: Tensor) -> Tensor:
    """Return a copy in host memory. On a GPU platform it is page-locked, so that copying it back overlaps with compute.

    Raises:
        RuntimeError: the driver cannot lock so much memory.
    """
    host = torch.empty_like(tensor, device="cpu")
    if platform.current().is_cuda and host.numel():
        _lock_pages(host)
    return host.copy_(tensor)


class Fetcher:
    """A queue of copies to the device, beside the compute queue. Copies run in the order of the calls."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream() if platform.current().is_cuda else None

    def start(self, host: Sequence[Tensor]) -> Arriving:
        """Begin to copy. The copy starts after the work that is now in the compute queue.

        Later work in the compute queue must call :meth:`Arriving.wait` before it uses the tensors.
        """
        arrived = [torch.empty_like(tensor, device=platform.device()) for tensor in host]
        if self._stream is None:
            for ours, theirs in zip(arrived, host, strict=True):
                ours.copy_(theirs)
            return Arriving(arrived, None)
        # Another layer may still be using this memory. Wait until its last use is over.
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
        """Return the tensors. Work queued from now on can use them.

        Call it also before dropping the tensors unused. Their memory returns to the compute queue's pool, which must
        not write into it before the copy is done.
        """
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)
        return self._tensors


def available_host_bytes() -> int:
    """Return the bytes of host memory that processes can still allocate, within the limit of the control group."""
    available = psutil.virtual_memory().available
    for path in map(Path, _CGROUP_LIMITS):
        text = path.read_text().strip() if path.is_file() else "max"
        if text.isdigit():
            available = min(available, int(text) - _cgroup_usage(path))
    return max(0, available)


def local_world_size() -> int:
    """Return the number of processes of this job on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))


def _lock_pages(host: Tensor) -> None:
    # torch's pinned allocator rounds sizes up to powers of two. For an embedding this wastes gigabytes.
    cudart, address = torch.cuda.cudart(), host.data_ptr()
    error = int(cudart.cudaHostRegister(address, host.nbytes, 0))
    if error:
        raise RuntimeError(f"cannot lock {host.nbytes} bytes of host memory: CUDA error {error}; see ulimit -l")
    weakref.finalize(host.untyped_storage(), cudart.cudaHostUnregister, address)


def _cgroup_usage(limit: Path) -> int:
    usage = limit.with_name({"memory.max": "memory.current"}.get(limit.name, "memory.usage_in_bytes"))
    return int(usage.read_text())
