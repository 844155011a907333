"""Frozen weights in FP8. While a layer runs, its weights are converted back to the model's own dtype.

The format is E4M3 (arXiv 2209.05433) with one fp32 scale per row, computed from the row. So the scales are right from
the first batch on, and do not depend on activations. No FP8 hardware is needed. The LM head and the norms are not
quantised: an error in the head would change every log-probability.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_LARGEST = torch.finfo(torch.float8_e4m3fn).max


def keep_in_fp8(chunks: Sequence[torch.nn.Module]) -> None:
    """Quantise the embedding and the projections of model chunks from ``build_gpt``, in place and permanently.

    Their ``weight`` is empty, except while the module's ``forward`` runs. The chunks can no longer be trained or saved.
    """
    for chunk in chunks:
        for module in _quantized_modules(chunk):
            _quantize(module)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return a matrix ``[M, N]`` as float8_e4m3fn ``[M, N]``, and the float32 scale ``[M, 1]`` of each row.

    The largest absolute value of a row becomes the largest number of the format. Rows of zeros have scale 1.
    """
    scales = weight.abs().amax(dim=1, keepdim=True).float() / _LARGEST
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    return (weight.float() / scales).to(torch.float8_e4m3fn), scales


def dequantize_rows(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Invert :func:`quantize_rows`, and return the result in ``dtype``."""
    return (values.float() * scales).to(dtype)


def _quantized_modules(chunk: torch.nn.Module) -> Iterator[torch.nn.Module]:
    for name, module in chunk.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() == 2 and name.rpartition(".")[2] != "output_layer":
            yield module


@torch.no_grad()
def _quantize(module: torch.nn.Module) -> None:
    dtype = module.weight.dtype
    values, scales = quantize_rows(module.weight)
    module.register_buffer("weight_fp8", values, persistent=False)
    module.register_buffer("weight_fp8_scale", scales, persistent=False)
    nothing = torch.empty(0, dtype=dtype, device=values.device)
    module.weight.requires_grad_(False).data = nothing

    def unfold(module: torch.nn.Module, *_unused) -> None:
        module.weight.data = dequantize_rows(module.weight_fp8, module.weight_fp8_scale, dtype)

    def fold(module: torch.nn.Module, *_unused) -> None:
        module.weight.data = nothing

    module.register_forward_pre_hook(unfold)
    module.register_forward_hook(fold)
