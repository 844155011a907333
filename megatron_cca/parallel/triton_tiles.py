"""The two operations of ``softmax_tiles`` as Triton kernels: one pass over the tile each, for GPUs.

The matrix products stay with the GPU's own library. ``TRITON_INTERPRET=1`` runs the kernels on a CPU, as the tests do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 2048
# Options of every launch. Whether a * b + c is one instruction must not depend on the version of Triton, whose default
# changes in 3.10: a cached reference has the bits of the run that wrote it. Said here and not by the environment's
# TRITON_DEFAULT_FP_FUSION, which counts for the kernels of all others in the process, too. It is as Triton has had it
# so far, and rounds once instead of twice: the only place is a running sum times a factor, plus a sum.
_LAUNCH = {"num_warps": 8, "enable_fp_fusion": True}


def absorb(logits: Tensor, local_targets: Tensor, peak: Tensor, sum_exp: Tensor, target_logits: Tensor) -> None:
    """See :func:`softmax_tiles.absorb`; leaves ``logits`` as they are."""
    rows, width = logits.shape
    if rows:
        _absorb_kernel[(rows,)](
            *(logits, logits.stride(0), local_targets, peak, sum_exp, target_logits, width), COLUMNS=_COLUMNS, **_LAUNCH
        )


def logits_gradient(
    logits: Tensor, local_targets: Tensor, peak: Tensor, sum_exp: Tensor, upstream: Tensor, dtype: torch.dtype
) -> Tensor:
    """See :func:`softmax_tiles.logits_gradient`."""
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
