"""Computes RMSNorm as Transformer Engine's kernels do, in float32 inside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.te.rig.quantization import to_torch


def rmsnorm_forward(
    rows: Tensor, weight: Tensor, eps: float, out: Any, quantizer: Any, dtype: Any, sm_margin: int, zero_centered: bool
) -> tuple[Any, None, Tensor]:
    """Normalise ``[N, H]``.

    Returns:
        The rows in ``dtype`` or quantised; the mean, which RMSNorm has not; the inverse deviations, float32 ``[N]``.
    """
    inverse = torch.rsqrt(rows.float().pow(2).mean(-1) + eps)
    found = (rows.float() * inverse[:, None] * _gain(weight, zero_centered)).to(to_torch(dtype))
    if quantizer is not None:
        found = quantizer(found) if out is None else quantizer.update_quantized(found, out)
    elif out is not None:
        found = out.copy_(found)
    return found, None, inverse


def rmsnorm_backward(
    grad: Tensor, rows: Tensor, inverse: Tensor, weight: Tensor, sm_margin: int, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the rows, ``[N, H]``, and of the weight, ``[H]``."""
    normal = rows.float() * inverse[:, None]
    inner = grad.float() * _gain(weight, zero_centered)
    outer = (inner - normal * (inner * normal).mean(-1, keepdim=True)) * inverse[:, None]
    return outer.to(rows.dtype), (grad.float() * normal).sum(0).to(weight.dtype)


def _gain(weight: Tensor, zero_centered: bool) -> Tensor:
    return weight.float() + (1.0 if zero_centered else 0.0)


KERNELS = {"rmsnorm_fwd": rmsnorm_forward, "rmsnorm_bwd": rmsnorm_backward}
