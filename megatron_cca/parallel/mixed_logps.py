"""Log-probabilities by a mixture of the logits with and without the condition (arXiv 2501.15420)."""

from __future__ import annotations

from typing import Any

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
    conditional, _ = hidden.chunk(2, dim=1)
    mask, unconditional_mask = mask.chunk(2)
    constant, samples = conditional.new_zeros(conditional.shape), mask.size(0)
    # The n-th image token of a row is the n-th of its partner.
    (rows, here), (partners, there) = (one.nonzero().unbind(1) for one in (mask, unconditional_mask))
    from_flat, to_flat = hidden.detach().reshape(-1, hidden.size(-1)), constant.view(-1, hidden.size(-1))
    sources = there * 2 * samples + samples + partners
    to_flat.index_copy_(0, here * samples + rows, from_flat.index_select(0, sources).mul_(1 - share))
    if bias is not None:
        bias = bias.detach() + share * (bias - bias.detach())
    return sequence_logps(
        share * conditional, weight, targets.chunk(2)[0], mask, bias=bias, constant=constant, **options
    )
