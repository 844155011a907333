"""Multiplies matrices as cuBLAS does for Transformer Engine on a Hopper GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.te.rig.quantization import is_quantized, to_torch, values_for_a_product

_DROPPED_BITS = 13  # of float32's 23 bits of mantissa; TF32 has 10


def generic_gemm(
    a: Any,
    transpose_a: bool,
    b: Any,
    transpose_b: bool,
    out: Tensor | None,
    quantizer: Any,
    out_dtype: Any,
    bias: Tensor | None,
    bias_dtype: Any,
    gelu: bool,
    gelu_input: Tensor | None,
    is_gradient: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    split_accumulator: bool,
    *,
    extra_output: Tensor | None = None,
    alpha: float = 1.0,
    **overlap: Any,
) -> tuple[Any, None, None, Tensor | None]:
    """Multiply as Transformer Engine's column-major convention says: ``op(b) @ op(a)``, row-major.

    Returns:
        The product with its bias, quantised if there is a quantizer; in a product for the gradient of weights instead
        the gradient of the bias; no GELU; ``extra_output``.
    """
    assert not gelu, "the project's layers have no GELU of Transformer Engine's"
    assert alpha == 1.0 and overlap.get("comm_overlap") is None
    left = values_for_a_product(b, needs_transpose=transpose_b)
    right = values_for_a_product(a, needs_transpose=not transpose_a)
    if _is_float32(a) and _is_float32(b):
        left, right = as_tf32(left), as_tf32(right)
    found = _flat(left, transpose_b) @ _flat(right, transpose_a)
    bias_gradient = None
    if is_gradient and bias is not None:
        bias_gradient = _flat(left, transpose_b).sum(1).to(bias.dtype)
    elif bias is not None:
        found += bias.float()
    if not transpose_b:
        found = found.reshape(*left.shape[:-1], found.shape[-1])
    if out is not None:
        found = found.reshape(out.shape).to(out.dtype)
        found = out.add_(found) if accumulate else out.copy_(found)
    else:
        found = found.to(torch.bfloat16 if out_dtype is None else to_torch(out_dtype))
    return found if quantizer is None else quantizer(found), bias_gradient, None, extra_output


def as_tf32(values: Tensor) -> Tensor:
    """Round float32 to the 10 bits of mantissa that TF32 has, to the nearest, ties to even."""
    bits = values.contiguous().view(torch.int32)
    to_even = (bits >> _DROPPED_BITS) & 1
    half = (1 << (_DROPPED_BITS - 1)) - 1
    return ((bits + half + to_even) & ~((1 << _DROPPED_BITS) - 1)).view(torch.float32)


def _flat(values: Tensor, transpose: bool) -> Tensor:
    matrix = values.reshape(-1, values.shape[-1])
    return matrix.t() if transpose else matrix


def _is_float32(operand: Any) -> bool:
    return not is_quantized(operand) and operand.dtype == torch.float32


KERNELS = {"generic_gemm": generic_gemm}
