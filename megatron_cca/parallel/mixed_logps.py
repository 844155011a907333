"""Log-probabilities by a mixture of the logits with and without the condition (arXiv 2501.15420)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_cca.parallel.sequence_logps import sequence_logps


def mixed_sequence_logps(
    hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor, *, share: float, bias: Tensor | None, **options: Any
) -> Tensor:
    """Return the summed log-probabilities of B samples from 2 B rows, float32 ``[B]``.

    The first B rows have the condition, the last B the same images without it. The logits are ``share`` x those of the
    first plus (1 - ``share``) x those of the second, which are constants: neither the hidden states nor the head get a
    gradient from them. The head is linear. Therefore one pass of the mixed hidden states through it suffices.

    Args:
        hidden, weight, targets, mask, bias: see :func:`sequence_logps`. An image may begin at another position in the
            second row than in the first.
        share: from 0 to 1.
        options: see :func:`sequence_logps`.
    """
    conditional, unconditional = hidden.chunk(2, dim=1)
    mask, unconditional_mask = mask.chunk(2)
    constant = torch.zeros_like(conditional)
    # The n-th image token of a row is the n-th of its partner.
    here, there = (own.transpose(0, 1) for own in (constant, unconditional.detach()))
    here[mask] = (1 - share) * there[unconditional_mask]
    if bias is not None:
        bias = bias.detach() + share * (bias - bias.detach())
    return sequence_logps(
        share * conditional, weight, targets.chunk(2)[0], mask, bias=bias, constant=constant, **options
    )
