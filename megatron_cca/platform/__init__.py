"""The platform that the program runs on: CUDA with NCCL, or a CPU with gloo.

Only this package uses ``torch.cuda``. Call :func:`install` once, before Megatron-Core is imported. Then Megatron-Core
runs unmodified, and the rest of the project asks this module for devices, backends and memory.
"""

from __future__ import annotations

import ctypes
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_cca.errors import UserError
from megatron_cca.io.options import DeviceChoice
from megatron_cca.io.paths import leave_without_current_folder

# If the current folder does not exist, MKL ends the process with a misleading message about a library.
leave_without_current_folder()
import torch  # noqa: E402

_MANY = 256


@dataclass(frozen=True)
class Platform:
    """A device type (``"cpu"`` or ``"cuda"``) and the torch.distributed backend that serves it."""

    device_type: Literal["cpu", "cuda"]
    backend: Literal["gloo", "nccl"]

    @property
    def is_cuda(self) -> bool:
        """Whether tensors live on a GPU."""
        return self.device_type == "cuda"


_CPU = Platform("cpu", "gloo")
_CUDA = Platform("cuda", "nccl")
_installed: Platform | None = None


def install(choice: DeviceChoice = "auto") -> Platform:
    """Choose the platform for this process and prepare Megatron-Core for it. A second call is harmless.

    Args:
        choice: ``"auto"`` takes CUDA if a GPU is visible, else the CPU. ``"cpu"`` and ``"cuda"`` take only that one.

    Returns:
        The installed platform.

    Raises:
        ValueError: ``"cuda"`` without a visible GPU, or another choice than the platform already installed.
    """
    global _installed
    if _installed is not None:
        if choice not in ("auto", _installed.device_type):
            raise ValueError(f"device {choice!r}: this process already runs on {_installed.device_type!r}")
        return _installed
    from megatron_cca.megatron_compat import start

    start.hide_expected_messages()
    start.hide_unwanted_packages()
    _limit_hardware_queues()
    platform = _choose(choice)
    if platform is _CPU:
        from megatron_cca.platform import cpu

        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        cpu.redirect_cuda_to_cpu()
    else:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    start.serve_megatron()
    _installed = platform
    return platform


def install_option(choice: DeviceChoice) -> None:
    """Call :func:`install` with what ``--device`` says; raises :class:`UserError` for what cannot be."""
    try:
        install(choice)
    except ValueError as error:
        raise UserError(f"--device: {error}") from None


def current() -> Platform:
    """Return the installed platform. Installs ``"auto"`` if none is installed yet."""
    return _installed or install()


def device() -> torch.device:
    """Return the device of this rank's tensors."""
    if current().is_cuda:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def process_group_options() -> dict:
    """Return the keyword arguments for ``torch.distributed.init_process_group`` on this platform."""
    options: dict = {"backend": current().backend}
    if "MASTER_PORT" not in os.environ:
        # Not under torchrun: a job of one process needs no port.
        options |= {"store": torch.distributed.HashStore(), "rank": 0, "world_size": 1}
    elif os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and os.environ.get("GROUP_WORLD_SIZE") == "1":
        options |= _fresh_rendezvous(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if current().is_cuda:
        options["device_id"] = device()
    return options


def synchronize(on: torch.device | None = None) -> None:
    """Wait for the work queued on the device, so that wall-clock times are right.

    Args:
        on: the device. None means the current one. In a thread other than the main thread, this is the first GPU.
    """
    if current().is_cuda:
        torch.cuda.synchronize(on)


def memory_bytes() -> int:
    """Return the bytes in use now: of the allocator on a GPU, of the process's resident set on a CPU."""
    return torch.cuda.memory_allocated() if current().is_cuda else resident_bytes()


def peak_memory_bytes() -> int:
    """Return the peak of bytes in use since the start or since :func:`reset_peak_memory`."""
    return torch.cuda.max_memory_allocated() if current().is_cuda else resident_bytes(peak=True)


def reset_peak_memory() -> None:
    """Restart the measurement of peak memory."""
    if current().is_cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def resident_bytes(*, peak: bool = False) -> int:
    """Return the size of the process's resident set in bytes, now or at its peak. Needs no :func:`install`."""
    # The peak of getrusage survives exec. A process started by a large one would report the peak of its parent.
    field = "VmHWM" if peak else "VmRSS"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def num_devices(choice: DeviceChoice = "auto") -> tuple[str, int]:
    """Return the device type that :func:`install` would choose, and its number of devices. Needs no :func:`install`.

    Returns:
        ``"cuda"`` and the number of visible GPUs, or ``"cpu"`` and the number of cores that this process may use.

    Raises:
        ValueError: see :func:`install`.
    """
    if _choose(choice).is_cuda:
        return "cuda", torch.cuda.device_count()
    return "cpu", len(os.sched_getaffinity(0))


def host_name() -> str:
    """Return this machine's name, for logs."""
    return socket.gethostname()


def device_name() -> str:
    """Return a name of the device for logs: the GPU's name, or the number of CPU threads."""
    if current().is_cuda:
        return torch.cuda.get_device_name()
    return f"CPU ({torch.get_num_threads()} threads)"


def compute_capabilities() -> list[tuple[int, int]]:
    """Return the major and minor compute capability of every GPU of this machine. Empty without library or driver.

    The call does not start CUDA. A process can still fork, or set variables that CUDA reads at its start.
    """
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return []
    return _asked(library)


def _limit_hardware_queues() -> None:
    """Set ``CUDA_DEVICE_MAX_CONNECTIONS`` to 1 if the GPUs need it and it is not set. Call it before CUDA starts.

    Up to Hopper, Megatron overlaps tensor- and context-parallel communication with compute only if one hardware queue
    keeps the order of launches. Blackwell (compute capability 10) does not need this limit, and loses overlap with it.
    """
    found = compute_capabilities()
    if not found or min(found) < (10, 0):
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def _choose(choice: DeviceChoice) -> Platform:
    if choice == "cpu":
        return _CPU
    if torch.cuda.is_available():
        return _CUDA
    if choice == "cuda":
        raise ValueError("device 'cuda': no GPU is visible to this process; use 'cpu' or 'auto'")
    return _CPU


def _fresh_rendezvous(attempt: str) -> dict:
    """Return a part of torchrun's store that holds nothing from killed ranks.

    torchrun gives the store of the first attempt to later attempts, with the addresses of dead ranks
    (pytorch/pytorch#135712). The part is named by torchrun's count of restarts. On one machine, all ranks have the same
    count. On several machines the counts can differ: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's environment
    there (docs/reliability.md).
    """
    store, rank, world_size = next(torch.distributed.rendezvous("env://"))
    return {"store": torch.distributed.PrefixStore(attempt, store), "rank": rank, "world_size": world_size}


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
