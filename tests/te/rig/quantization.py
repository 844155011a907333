"""Rounds to FP8 with one scale a tensor, taken from the tensor itself (tensorwise) or from earlier steps (delayed)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformer_engine.pytorch.constants import TE_DType_To_Torch
from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer
from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage


def to_torch(dtype: Any) -> torch.dtype:
    """Return torch's name of one of Transformer Engine's types."""
    return TE_DType_To_Torch.get(dtype, dtype)


def is_quantized(operand: Any) -> bool:
    """Whether an operand is Transformer Engine's FP8."""
    return isinstance(operand, Float8TensorStorage)


def quantize(values: Tensor, quantizer: Any, out: Any = None, noop: Tensor | None = None) -> Any:
    """Round to FP8 in the layouts that the quantizer asks for: rows, columns or both."""
    if noop is not None and bool(noop):
        return out
    scale = _current_scale(values, quantizer) if _is_current(quantizer) else _delayed_scale(values, quantizer)
    dtype = to_torch(quantizer.dtype)
    largest = torch.finfo(dtype).max
    data = (values.float() * scale).clamp(-largest, largest).to(dtype).view(torch.uint8)
    out = _new(values, quantizer) if out is None else out
    if out._data is not None:
        out._data.copy_(data.reshape(out._data.shape))
    if out._transpose is not None:
        transposed_bytes(data, quantizer.dtype, out._transpose)
        out._transpose_invalid = False
    out._scale_inv.copy_(scale.reciprocal().reshape(out._scale_inv.shape))
    return out


def bias_gradient_and_quantized(gradient: Tensor, quantizer: Any) -> tuple[Tensor, Any]:
    """Return the gradient of a bias, ``[N]`` for ``[..., N]``, and the gradient itself in FP8."""
    return gradient.float().flatten(0, -2).sum(0).to(gradient.dtype), quantize(gradient, quantizer)


def dequantize(tensor: Any, dtype: Any) -> Tensor:
    """Return the values of an FP8 tensor in ``dtype``."""
    return _values(tensor._data, tensor).to(to_torch(dtype))


def values_for_a_product(operand: Any, *, needs_transpose: bool) -> Tensor:
    """Return an operand's values in float32, read from the bytes that a Hopper GPU reads.

    Its FP8 products take rows alone, so that the transpose must be there wherever columns are wanted.
    """
    if not is_quantized(operand):
        return operand.float()
    if not needs_transpose:
        assert operand._data is not None, "an operand of an FP8 product lacks its rows"
        return _values(operand._data, operand)
    assert operand._transpose is not None and not operand._transpose_invalid, "an operand lacks its transpose"
    # The last dimension comes first in Transformer Engine's transposes.
    return _values(operand._transpose.movedim(0, -1).contiguous(), operand)


def transposed_bytes(data: Tensor, dtype: Any, out: Tensor | None = None) -> Tensor:
    """Return ``[..., N]`` as ``[N, ...]``, the layout of Transformer Engine's transposes."""
    found = data.movedim(-1, 0).contiguous()
    return found if out is None else out.copy_(found.reshape(out.shape))


def update_delayed_scales(
    newest: Tensor, histories: Sequence[Tensor], scales: Sequence[Tensor], algorithm: str, dtype: Any, margin: float
) -> None:
    """Move the histories of largest values on by a step and set the scales by them, in place.

    Args:
        newest: the largest values of this step, of all histories one after the other; 0 where a history has its own.
        histories: ``[steps, tensors]`` each; this step's values are collected in the first row.
        scales: ``[tensors]`` each.
        algorithm: ``max`` over the history, or ``most_recent``.
        dtype: of the FP8 that is scaled to.
        margin: so many powers of two are left free.
    """
    largest = torch.finfo(to_torch(dtype)).max
    parts = newest.split([history.shape[1] for history in histories])
    for part, history, scale in zip(parts, histories, scales, strict=True):
        last = torch.where(part != 0, part, history[0])
        moved = torch.cat([history[1:], last[None]])
        peak = moved.amax(0) if algorithm == "max" else last
        wanted = (largest / peak / 2**margin).clamp(max=torch.finfo(torch.float32).max)
        scale.copy_(torch.where((peak > 0) & peak.isfinite(), wanted, scale))
        history.copy_(moved)
        history[0].zero_()


def compute_amax(values: Tensor, out: Tensor) -> None:
    """Write the largest magnitude into ``out``."""
    out.copy_(values.abs().max())


def _is_current(quantizer: Any) -> bool:
    return isinstance(quantizer, Float8CurrentScalingQuantizer)


def _current_scale(values: Tensor, quantizer: Any) -> Tensor:
    assert not (quantizer.with_amax_reduction or quantizer.force_pow_2_scales), "not emulated"
    peak = values.float().abs().amax().clamp(min=quantizer.amax_epsilon)
    wanted = torch.finfo(to_torch(quantizer.dtype)).max / peak
    return torch.where((peak > 0) & peak.isfinite(), wanted, torch.ones_like(wanted))


def _delayed_scale(values: Tensor, quantizer: Any) -> Tensor:
    peak = values.float().abs().amax().reshape(quantizer.amax.shape)
    quantizer.amax.copy_(torch.maximum(quantizer.amax, peak))
    return quantizer.scale.reshape(()).clone()


def _new(values: Tensor, quantizer: Any) -> Any:
    empty = quantizer.make_empty(values.shape, dtype=values.dtype, device=values.device)
    if not quantizer.internal:
        return empty
    return Float8TensorStorage(
        data=empty._data,
        fp8_scale_inv=empty._scale_inv,
        fp8_dtype=empty._fp8_dtype,
        data_transpose=empty._transpose,
        quantizer=quantizer,
    )


def _values(data: Tensor, tensor: Any) -> Tensor:
    return data.view(to_torch(tensor._fp8_dtype)).float() * tensor._scale_inv.float()


KERNELS = {
    "quantize": quantize,
    "bgrad_quantize": bias_gradient_and_quantized,
    "dequantize": dequantize,
    "fp8_transpose": transposed_bytes,
    "fused_amax_and_scale_update_after_reduction": update_delayed_scales,
    "compute_amax": compute_amax,
}
