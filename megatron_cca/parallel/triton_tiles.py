"""The two operations of ``tiles`` as Triton kernels for GPUs. Each makes one pass over the tile.

The GPU's own library does the matrix products. ``TRITON_INTERPRET=1`` runs the kernels on a CPU, as the tests do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 2048
# Options of every launch. FP fusion computes a * b + c as one instruction, which rounds once instead of twice. It only
# matters where a running sum is multiplied by a factor and added to a sum. Triton's default changes in 3.10. Set it
# here, so that a cached reference has the same bits under every version. The environment variable
# TRITON_DEFAULT_FP_FUSION would also change all other kernels of the process.
_LAUNCH = {"num_warps": 8, "enable_fp_fusion": True}


def absorb(logits: Tensor, local_targets: Tensor, peak: Tensor, sum_exp: Tensor, target_logits: Tensor) -> None:
    """Add a tile to the running softmax, see :func:`tiles.absorb`. Does not change ``logits``."""
    rows, width = logits.shape
    if rows:
        _absorb_kernel[(rows,)](
            *(logits, logits.stride(0), local_targets, peak, sum_exp, target_logits, width), COLUMNS=_COLUMNS, **_LAUNCH
        )


def logits_gradient(
    logits: Tensor, local_targets: Tensor, peak: Tensor, sum_exp: Tensor, upstream: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return the gradient of a tile, see :func:`tiles.logits_gradient`."""
    rows, width = logits.shape
    result = logits if dtype == logits.dtype else torch.empty_like(logits, dtype=dtype)
    if rows:
        grid = (rows, triton.cdiv(width, _COLUMNS))
        _gradient_kernel[grid](
            *(logits, logits.stride(0), result, result.stride(0), local_targets, peak, sum_exp, upstream, width),
            COLUMNS=_COLUMNS,
            **_LAUNCH,
        )
    return result


@triton.jit
def _absorb_kernel(logits, stride, local_targets, peak, sum_exp, target_logits, width, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    highest = tl.load(peak + row)
    total = tl.load(sum_exp + row)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        tile = tl.load(logits + row * stride + column, mask=column < width, other=-float("inf"))
        higher = tl.maximum(highest, tl.max(tile, axis=0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(tile - higher), axis=0)
        highest = higher
    tl.store(peak + row, highest)
    tl.store(sum_exp + row, total)
    target = tl.load(local_targets + row)
    inside = (target >= 0) & (target < width)
    value = tl.load(logits + row * stride + target, mask=inside, other=0.0)
    tl.store(target_logits + row, value, mask=inside)


@triton.jit
def _gradient_kernel(
    logits, logits_stride, result, result_stride, local_targets, peak, sum_exp, upstream, width, COLUMNS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    valid = column < width
    tile = tl.load(logits + row * logits_stride + column, mask=valid, other=-float("inf"))
    probabilities = tl.exp(tile - tl.load(peak + row)) / tl.load(sum_exp + row)
    is_target = column == tl.load(local_targets + row)
    gradient = tl.load(upstream + row) * (tl.where(is_target, 1.0, 0.0) - probabilities)
    tl.store(result + row * result_stride + column, gradient.to(result.dtype.element_ty), mask=valid)
