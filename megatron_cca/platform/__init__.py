"""Where the program runs: CUDA with NCCL, or a CPU with gloo.

The only package that touches ``torch.cuda``. Call :func:`install` once, before Megatron-Core is imported; from then
on Megatron-Core runs unmodified and the rest of the project asks this module for devices, backends and memory.
"""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_cca.errors import UserError
from megatron_cca.io.options import DeviceChoice
from megatron_cca.io.surroundings import leave_without_current_folder
from megatron_cca.platform import nvml

# MKL ends the process where there is none, with words about a library.
leave_without_current_folder()
import torch  # noqa: E402


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
    """Choose the platform for this process and prepare Megatron-Core for it. Idempotent.

    Args:
        choice: ``"auto"`` takes CUDA where a GPU is visible and the CPU elsewhere; ``"cpu"`` and ``"cuda"`` force.

    Returns:
        The platform in force.

    Raises:
        ValueError: ``"cuda"`` without a visible GPU, or another choice than the one already installed.
    """
    global _installed
    if _installed is not None:
        if choice not in ("auto", _installed.device_type):
            raise ValueError(f"device {choice!r}: this process already runs on {_installed.device_type!r}")
        return _installed
    from megatron_cca.platform import adam, cpu, quiet

    quiet.hide_expected_messages()
    # Checkpoints are written by Megatron's own writer; where it finds this one, it ends at import if that is too old.
    sys.modules.setdefault("nvidia_resiliency_ext.checkpointing.async_ckpt.core", None)
    _limit_hardware_queues()
    platform = _choose(choice)
    if platform is _CPU:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        cpu.redirect_cuda_to_cpu()
    else:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    adam.serve_megatron()
    _installed = platform
    return platform


def install_option(choice: DeviceChoice) -> None:
    """Call :func:`install` with what ``--device`` says; raises :class:`UserError` for what cannot be."""
    try:
        install(choice)
    except ValueError as error:
        raise UserError(f"--device: {error}") from None


def _limit_hardware_queues() -> None:
    """Set ``CUDA_DEVICE_MAX_CONNECTIONS`` to 1 where it is needed and nobody has set it; CUDA must not have started.

    Up to Hopper, Megatron overlaps tensor- and context-parallel communication with compute only if one hardware queue
    keeps the order of launches. Blackwell (compute capability 10) needs no such limit, which would cost it overlap.
    """
    found = nvml.compute_capabilities()
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


def current() -> Platform:
    """The installed platform; installs ``"auto"`` if nothing was installed yet."""
    return _installed or install()


def device() -> torch.device:
    """The device of this rank's tensors."""
    if current().is_cuda:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def process_group_options() -> dict:
    """Keyword arguments for ``torch.distributed.init_process_group`` on this platform."""
    options: dict = {"backend": current().backend}
    if "MASTER_PORT" not in os.environ:
        # Not under torchrun: a job of one process needs no port.
        options |= {"store": torch.distributed.HashStore(), "rank": 0, "world_size": 1}
    elif os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and os.environ.get("GROUP_WORLD_SIZE") == "1":
        options |= _fresh_rendezvous(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if current().is_cuda:
        options["device_id"] = device()
    return options


def _fresh_rendezvous(attempt: str) -> dict:
    """A place in torchrun's store where ranks that were killed have left nothing.

    torchrun hands the store of the first attempt to those after it, with the dead ranks' addresses
    (pytorch/pytorch#135712). On one machine its count of restarts is the same on every rank; on several it need not be,
    and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's environment is the way (docs/reliability.md).
    """
    store, rank, world_size = next(torch.distributed.rendezvous("env://"))
    return {"store": torch.distributed.PrefixStore(attempt, store), "rank": rank, "world_size": world_size}


def synchronize(on: torch.device | None = None) -> None:
    """Wait for the work queued on the device, so that a wall-clock reading means something.

    Args:
        on: the device; None is the current one, which in another thread than the main one is the machine's first.
    """
    if current().is_cuda:
        torch.cuda.synchronize(on)


def memory_bytes() -> int:
    """Bytes held now: by the allocator on a GPU, the process's resident set on a CPU."""
    return torch.cuda.memory_allocated() if current().is_cuda else resident_bytes()


def peak_memory_bytes() -> int:
    """Peak bytes held since the start or :func:`reset_peak_memory`."""
    return torch.cuda.max_memory_allocated() if current().is_cuda else resident_bytes(peak=True)


def reset_peak_memory() -> None:
    """Let the peak count from now on."""
    if current().is_cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def resident_bytes(*, peak: bool = False) -> int:
    """The process's resident set, now or at its peak; needs no :func:`install`."""
    # Not getrusage: its peak survives exec, so that a process started by a large one would report the parent's.
    field = "VmHWM" if peak else "VmRSS"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def num_devices(choice: DeviceChoice = "auto") -> tuple[str, int]:
    """What :func:`install` would choose, ``"cpu"`` or ``"cuda"``, and how many processes this machine has room for.

    Returns:
        The device type; the visible GPUs, or the cores that this process may use. Needs no :func:`install`.

    Raises:
        ValueError: as :func:`install`.
    """
    if _choose(choice).is_cuda:
        return "cuda", torch.cuda.device_count()
    return "cpu", len(os.sched_getaffinity(0))


def host_name() -> str:
    """This machine's name, for logs."""
    return socket.gethostname()


def device_name() -> str:
    """A name of the device for logs: the GPU's, or the number of CPU threads."""
    if current().is_cuda:
        return torch.cuda.get_device_name()
    return f"CPU ({torch.get_num_threads()} threads)"
