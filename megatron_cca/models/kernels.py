"""The section ``kernels`` as options of Megatron, with defaults for this device in place of null."""

from __future__ import annotations

from typing import Any

import torch

from megatron_cca import platform
from megatron_cca.config import KernelsConfig
from megatron_cca.megatron_compat.layers import apex_fuses_gradients, fuse_engine_gradients


def forward_kernels(kernels: KernelsConfig) -> dict[str, bool]:
    """Return which fused kernels a forward pass uses, by key. The last bits of its results depend on them."""
    on_gpu = platform.current().is_cuda
    return {
        "bias_activation_fusion": _chosen(kernels.bias_activation_fusion, on_gpu),
        "bias_dropout_fusion": _chosen(kernels.bias_dropout_fusion, on_gpu),
        "apply_rope_fusion": _chosen(kernels.apply_rope_fusion, False),
    }


def kernel_options(kernels: KernelsConfig, *, is_frozen: bool) -> dict[str, Any]:
    """Return the options for Megatron's ``TransformerConfig``.

    Args:
        kernels: section of the run's configuration.
        is_frozen: whether the weights never change. Such a model has no gradients and no CUDA graphs.
    """
    return {
        **forward_kernels(kernels),
        # Megatron's own layers need apex for this. Transformer Engine's do not, see fuse_weight_gradients.
        "gradient_accumulation_fusion": _fuses(kernels, is_frozen) and apex_fuses_gradients(),
        "cuda_graph_impl": "none" if is_frozen else kernels.cuda_graph_impl,
        "cuda_graph_modules": list(kernels.cuda_graph_modules),
        "cuda_graph_warmup_steps": kernels.cuda_graph_warmup_steps,
    }


def fuse_weight_gradients(gpt: torch.nn.Module, kernels: KernelsConfig, *, is_frozen: bool) -> None:
    """Let Transformer Engine's layers add their weight gradients to Megatron's buffer, if ``kernels`` asks for it."""
    if _fuses(kernels, is_frozen):
        fuse_engine_gradients(gpt)


def _fuses(kernels: KernelsConfig, is_frozen: bool) -> bool:
    # A frozen model has no gradient buffer.
    return _chosen(kernels.gradient_accumulation_fusion, False) and not is_frozen


def _chosen(value: bool | None, default: bool) -> bool:
    return default if value is None else value
