"""The rotary frequencies that some programs save along: computed anyway, but they say which base a model has."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_cca.errors import UserError
from megatron_cca.models.architecture import Architecture

# What bfloat16 leaves of them.
_TOLERANCE = 1e-2


def check_frequencies(name: str, found: Tensor, architecture: Architecture) -> None:
    """Refuse frequencies of another base than the model's, which is then not the model that was trained.

    Args:
        name: of the tensor, for messages.
        found: ``[channels of a head / 2]``; of another shape it says nothing.
        architecture: of the model.

    Raises:
        UserError: names the tensor and both bases.
    """
    channels = architecture.kv_channels
    if found.shape != (channels // 2,) or channels < 4:
        return
    places = torch.arange(0, channels, 2, dtype=torch.float64) / channels
    wanted = architecture.rotary_base**-places
    if not torch.allclose(found.double(), wanted, rtol=_TOLERANCE, atol=0):
        base = (found[1].double() ** (-channels / 2)).item()
        raise UserError(
            f"tensor {name} is of the rotary base {base:.6g}, config.json says {architecture.rotary_base:.6g}; mend "
            "the one that is wrong"
        )
