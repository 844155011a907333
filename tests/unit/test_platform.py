"""What the platform sets before CUDA starts, by the GPUs that NVIDIA's management library tells of."""

import ctypes
import os
from pathlib import Path

import pytest

from megatron_cca import platform

VARIABLE = "CUDA_DEVICE_MAX_CONNECTIONS"
HOPPER, BLACKWELL = (9, 0), (10, 0)


class Library:
    """Answers as libnvidia-ml does: 0 is success, results go through pointers."""

    def __init__(self, capabilities, failing=()):
        self.capabilities, self.failing, self.is_open = capabilities, failing, False

    def nvmlInit_v2(self):
        self.is_open = "init" not in self.failing
        return 0 if self.is_open else 9

    def nvmlShutdown(self):
        self.is_open = False
        return 0

    def nvmlDeviceGetCount_v2(self, count):
        assert self.is_open
        count._obj.value = len(self.capabilities)
        return 999 if "count" in self.failing else 0

    def nvmlDeviceGetHandleByIndex_v2(self, index, device):
        # No handle is null.
        device._obj.value = 1 + index.value
        return 15 if index.value in self.failing else 0

    def nvmlDeviceGetCudaComputeCapability(self, device, major, minor):
        major._obj.value, minor._obj.value = self.capabilities[device.value - 1]
        return 0


@pytest.mark.parametrize(
    ("capabilities", "failing", "found"),
    [
        ([HOPPER, BLACKWELL], (), [HOPPER, BLACKWELL]),
        ([HOPPER, (10, 3)], (0,), [(10, 3)]),
        ([HOPPER], ("init",), []),
        ([HOPPER], ("count",), []),
        ([], (), []),
    ],
)
def test_capabilities_are_asked_without_cuda(monkeypatch, capabilities, failing, found):
    library = Library(capabilities, failing)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert platform.compute_capabilities() == found
    assert not library.is_open


def test_where_there_is_no_library_nothing_is_known(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert platform.compute_capabilities() == []


@pytest.mark.parametrize(
    ("capabilities", "given", "wanted"),
    [
        ([HOPPER] * 8, None, "1"),
        ([BLACKWELL] * 8, None, None),
        ([(12, 0)], None, None),
        ([HOPPER, BLACKWELL], None, "1"),
        ([], None, "1"),
        ([HOPPER] * 8, "32", "32"),
        ([BLACKWELL] * 8, "1", "1"),
    ],
)
def test_hardware_queues_are_limited_up_to_hopper_and_by_the_user(monkeypatch, capabilities, given, wanted):
    monkeypatch.setattr(platform, "compute_capabilities", lambda: capabilities)
    # What monkeypatch has set once it takes back, whoever sets it meanwhile.
    monkeypatch.setenv(VARIABLE, given or "")
    if given is None:
        del os.environ[VARIABLE]
    platform._limit_hardware_queues()
    assert os.environ.get(VARIABLE) == wanted


def test_transformer_engine_is_bounded_to_what_was_looked_at():
    setup = (Path(__file__).parents[2] / "setup.py").read_text()
    assert '"transformer-engine[pytorch]>=2.11,<2.20"' in setup
