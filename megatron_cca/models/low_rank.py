"""The arithmetic of low-rank adapters, and their names in checkpoints; no Megatron."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_cca.config import LoraConfig

# Keys of a projection's A and B, in place of its own "weight"; Megatron-Bridge spells them so.
LINEAR_IN, LINEAR_OUT = "adapter.linear_in.weight", "adapter.linear_out.weight"

_ROWS_AT_A_TIME = 1024


def settings_of(chunks: Sequence[torch.nn.Module]) -> LoraConfig | None:
    """Return what the chunks' adapters were attached with (:func:`lora.attach`); None for chunks without adapters."""
    found = next((module.lora for module in chunks[0].modules() if hasattr(module, "lora")), None)
    return None if found is None else found.settings


def scale_of(settings: LoraConfig) -> float:
    """The factor ``alpha / dim`` of an adapter's output."""
    return settings.alpha / settings.dim


@torch.no_grad()
def merged_weight(weight: Tensor, linear_in: Tensor, linear_out: Tensor, scale: float) -> Tensor:
    """``W + scale * B A``, rounded to fp32 and then once to the weight's dtype.

    It is summed in fp64: then it depends neither on the machine nor on how a weight was cut, and a model that is merged
    on a GPU's shards has the bits of one that is exported by rows.

    Args:
        weight: ``[rows, columns]``, the whole or any block of it.
        linear_in: A, ``[dim, columns]``.
        linear_out: B, ``[rows, dim]``.
        scale: ``alpha / dim``.
    """
    result, factor = torch.empty_like(weight), linear_in.double()
    for start in range(0, weight.size(0), _ROWS_AT_A_TIME):
        rows = slice(start, start + _ROWS_AT_A_TIME)
        result[rows] = torch.addmm(weight[rows].double(), linear_out[rows].double(), factor, alpha=scale).float()
    return result
