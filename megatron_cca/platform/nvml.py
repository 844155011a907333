"""What NVIDIA's management library says of the GPUs; unlike any question to CUDA it initialises none."""

from __future__ import annotations

import ctypes

_MANY = 256


def compute_capabilities() -> list[tuple[int, int]]:
    """Major and minor compute capability of every GPU of this machine; none where the library or a driver is missing.

    Processes may be forked, and variables that CUDA reads when it starts may be set, after this call.
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
