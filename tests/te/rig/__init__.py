"""Runs Transformer Engine's own Python, and Megatron-Core's layers on it, on a CPU: a pytest plug-in.

    python -m pytest -p tests.te.rig tests/te tests/gpu

Only Transformer Engine's compiled kernels are emulated, in plain PyTorch: products (of float32 in TF32), RMSNorm, FP8
with a scale a tensor (its own, or a delayed one), Adam. The project believes that it runs on one Hopper GPU. The
patches touch the whole process and stay, so the rig has a process of its own; importing this package patches nothing.

Not emulated: streams, graphs, memory, NCCL, cuDNN, Triton, the kernel of rotary positions, FP8 with a scale a block. A
test that needs one of them says so with ``@pytest.mark.needs_hardware("streams")`` and is skipped here.
"""

from __future__ import annotations

from importlib.machinery import PathFinder
from typing import Any

import pytest

COMMAND = f"python -m pytest -p {__name__} tests/te tests/gpu"
_running = False


def is_running() -> bool:
    """Whether this process is on the rig."""
    return _running


def obstacle() -> str | None:
    """Say why the rig cannot run here; None where it can."""
    # Not importlib.util's, which would believe the platform of a CPU: that one hides the package.
    if PathFinder.find_spec("transformer_engine") is None:
        return "Transformer Engine is not installed"
    return None


def start() -> None:
    """Put this process on the rig, for good. To be called before Megatron-Core is imported. Idempotent."""
    global _running
    if _running:
        return
    from tests.te.rig import device, engine, project

    device.pretend()
    engine.emulate_kernels()
    project.install_platform()
    _running = True


@pytest.hookimpl(tryfirst=True)
def pytest_configure() -> None:
    """Start before ``tests/conftest.py`` chooses a device."""
    if obstacle() is None:
        start()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what asks for hardware that is not emulated."""
    if not is_running():
        return
    for item in items:
        reasons = [_missing(mark.args) for mark in item.iter_markers("needs_hardware")]
        if reasons:
            item.add_marker(pytest.mark.skip(reason="; ".join(reasons)))


def _missing(what: tuple[Any, ...]) -> str:
    return f"the rig does not emulate {', '.join(map(str, what))}"
