"""Puts the emulated kernels into Transformer Engine 2.11, whose Python stays as it is."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

# Read when they are imported. Compiling would take longer than anything that is tried here.
os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ["NVTE_TORCH_COMPILE"] = "0"

import torch
import transformer_engine.pytorch
import transformer_engine_torch as tex
from transformer_engine.pytorch.attention.dot_product_attention import utils as attention
from transformer_engine.pytorch.attention.dot_product_attention.softmax import FusedScaleMaskSoftmax

from tests.te.rig import gemm, norms, optimizers, quantization
from tests.te.rig.device import PROPERTIES

# No flash and no fused attention, and what serves them; the one in plain PyTorch; which of the three there are.
_PLAIN_ATTENTION = (False, None, False, None, True, [False, False, True])
_KERNELS: dict[str, Callable[..., Any]] = {
    **gemm.KERNELS,
    **norms.KERNELS,
    **quantization.KERNELS,
    **optimizers.KERNELS,
}


def emulate_kernels() -> None:
    """Replace the compiled kernels, and the questions about a device that only a driver answers."""
    workspace = torch.empty(1, dtype=torch.uint8)
    answers: dict[str, Callable[..., Any]] = {
        "get_device_compute_capability": lambda *device: (PROPERTIES.major, PROPERTIES.minor),
        "get_sm_count": lambda *device: PROPERTIES.multi_processor_count,
        "canonicalize_device": lambda device=None: torch.device("cpu"),
        "devices_match": lambda one, other: True,
        "get_cublas_workspace": lambda *arguments: workspace,
        "_empty_tensor": lambda: torch.empty(0),
        "_get_cuda_rng_state": lambda *arguments, **options: torch.get_rng_state(),
        "_set_cuda_rng_state": lambda state, *arguments, **options: torch.set_rng_state(state),
    }
    for name, kernel in _KERNELS.items():
        setattr(tex, name, kernel)
    for name, function in (_KERNELS | answers).items():
        _replace_everywhere(name, function)
    # Not by its environment variables: Megatron-Core refuses them beside attention_backend=auto.
    attention.get_attention_backend = lambda parameters: _PLAIN_ATTENTION
    FusedScaleMaskSoftmax.is_kernel_available = lambda self, *sizes: False


def _replace_everywhere(name: str, function: Callable[..., Any]) -> None:
    """Set a name in each of Transformer Engine's modules that has bound it."""
    for module in [module for name, module in sys.modules.items() if name.startswith(transformer_engine.__name__)]:
        if name in vars(module):
            setattr(module, name, function)
