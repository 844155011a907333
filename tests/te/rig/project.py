"""Lets the project believe in the emulated GPU, while its ranks talk over gloo."""

from __future__ import annotations

import torch

from megatron_cca import platform
from megatron_cca.megatron_compat import start
from megatron_cca.platform import cpu
from tests.te.rig.device import STREAM


def install_platform() -> None:
    """Install the CPU's platform with Transformer Engine left in, and call it CUDA.

    To be called after Transformer Engine's kernels are emulated: Megatron-Core, imported here, keeps some by name.
    """
    start.hide_gpu_only_packages = lambda: None
    cpu._STREAM = STREAM
    platform.install("cpu")
    platform._installed = platform.Platform("cuda", "gloo")
    platform.device = lambda: torch.device("cpu")
    options = platform.process_group_options
    # Gloo has no device of its own.
    platform.process_group_options = lambda: {key: value for key, value in options().items() if key != "device_id"}
