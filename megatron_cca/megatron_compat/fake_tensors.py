"""Replacements for functions of Megatron-Core 0.19.2 that fail with fake tensors, which have shapes but no numbers."""

from __future__ import annotations

from contextlib import AbstractContextManager
from unittest.mock import patch

import torch
from megatron.core.fusions import fused_bias_swiglu
from megatron.core.optimizer import clip_grads


def replaced_norm() -> AbstractContextManager:
    """Return a patch for the L2 norm. Megatron's own substitute for a fused kernel reads the tensors' numbers."""
    return patch.object(clip_grads, "l2_norm_impl", _l2_norm)


def replaced_fusions() -> list[AbstractContextManager]:
    """Return patches for Megatron's compiled functions. Compiled, they allocate only the tensors that they return."""
    return [
        patch.object(fused_bias_swiglu, "swiglu", lambda y: y.new_empty(*y.shape[:-1], y.size(-1) // 2)),
        patch.object(fused_bias_swiglu, "swiglu_back", lambda _gradient, y: torch.empty_like(y)),
    ]


def _l2_norm(_chunk_size, _noop_flag, tensor_lists: list[list[torch.Tensor]], *_per_tensor) -> tuple:
    norms = [torch.linalg.vector_norm(tensor) for tensor in tensor_lists[0]]
    return torch.linalg.vector_norm(torch.stack(norms)), None
