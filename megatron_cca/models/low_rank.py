"""The arithmetic of low-rank adapters, and their names in checkpoints. Needs no Megatron."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_cca.config import LoraConfig

# Names of a projection's A and B, in place of its own "weight". Megatron-Bridge has the same names.
LINEAR_IN, LINEAR_OUT = "adapter.linear_in.weight", "adapter.linear_out.weight"

_ROWS_AT_A_TIME = 1024


def settings_of(chunks: Sequence[torch.nn.Module]) -> LoraConfig | None:
    """Return what the chunks' adapters were attached with (:func:`lora.attach`); None for chunks without adapters."""
    found = next((module.lora for module in chunks[0].modules() if hasattr(module, "lora")), None)
    return None if found is None else found.settings


def scale_of(settings: LoraConfig) -> float:
    """Return the factor ``alpha / dim`` of an adapter's output."""
    return settings.alpha / settings.dim


@torch.no_grad()
def merged_weight(weight: Tensor, linear_in: Tensor, linear_out: Tensor, scale: float) -> Tensor:
    """Return ``W + scale * B A``, rounded to fp32 and then once to the weight's dtype.

    The sum is in fp64, so that the result does not depend on the machine or on how the weight is split. A merge of
    shards on a GPU gives the same bits as an export by rows.

    Args:
        weight: ``[rows, columns]``, the whole weight or any block of it.
        linear_in: A, ``[dim, columns]``.
        linear_out: B, ``[rows, dim]``.
        scale: ``alpha / dim``.
    """
    result, factor = torch.empty_like(weight), linear_in.double()
    for start in range(0, weight.size(0), _ROWS_AT_A_TIME):
        rows = slice(start, start + _ROWS_AT_A_TIME)
        result[rows] = torch.addmm(weight[rows].double(), linear_out[rows].double(), factor, alpha=scale).float()
    return result
