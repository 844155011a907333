"""Queries to NVIDIA's management library. Unlike CUDA queries, they do not initialise a GPU."""

from __future__ import annotations

import ctypes

_MANY = 256


def compute_capabilities() -> list[tuple[int, int]]:
    """Return the major and minor compute capability of every GPU of this machine. Empty without library or driver.

    The call does not start CUDA. A process can still fork, or set variables that CUDA reads at its start.
    """
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return []
    return _asked(library)


def _asked(library: ctypes.CDLL) -> list[tuple[int, int]]:
    if library.nvmlInit_v2() != 0:
        return []
    try:
        count = ctypes.c_uint()
        if library.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
            return []
        found = [_capability(library, index) for index in range(min(count.value, _MANY))]
        return [one for one in found if one is not None]
    finally:
        library.nvmlShutdown()


def _capability(library: ctypes.CDLL, index: int) -> tuple[int, int] | None:
    device, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
    if library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(device)) != 0:
        return None
    if library.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor)) != 0:
        return None
    return major.value, minor.value
