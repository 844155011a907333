"""Functions of Megatron-Core 0.19.2 that fake tensors, which have shapes and no numbers, cannot go through."""

from __future__ import annotations

from contextlib import AbstractContextManager
from unittest.mock import patch

import torch
from megatron.core.fusions import fused_bias_swiglu
from megatron.core.optimizer import clip_grads


def replaced_norm() -> AbstractContextManager:
    """Megatron's substitute for a fused kernel makes one tensor of a list of tensors, number by number."""
    return patch.object(clip_grads, "l2_norm_impl", _l2_norm)


def replaced_fusions() -> list[AbstractContextManager]:
    """Megatron compiles its fused functions; compiled, they make no more than what they return."""
    return [
        patch.object(fused_bias_swiglu, "swiglu", lambda y: y.new_empty(*y.shape[:-1], y.size(-1) // 2)),
        patch.object(fused_bias_swiglu, "swiglu_back", lambda _gradient, y: torch.empty_like(y)),
    ]


def _l2_norm(_chunk_size, _noop_flag, tensor_lists: list[list[torch.Tensor]], *_per_tensor) -> tuple:
    norms = [torch.linalg.vector_norm(tensor) for tensor in tensor_lists[0]]
    return torch.linalg.vector_norm(torch.stack(norms)), None
