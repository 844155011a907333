"""Combine the logits of a conditional and an unconditional stream into those that the next token is drawn from."""

from __future__ import annotations

import torch
from torch import Tensor


def guided_logits(conditional: Tensor, unconditional: Tensor, guidance_scale: float) -> Tensor:
    """Return the guided logits ``(1 + s) * conditional - s * unconditional`` (arXiv 2410.09347, equation 3).

    The argument ``guidance_scale`` is s, and 0 is guidance-free. Emu3's and LlamaGen's own programs call 1 + s the
    scale.
    """
    return conditional + guidance_scale * (conditional - unconditional)


def contrastive_logits(conditional: Tensor, unconditional: Tensor, top_k: int, alpha: float) -> Tensor:
    """Return the logits of contrastive decoding with a top-k set, CD-K (CM3Leon, arXiv 2309.02591, section 3.4).

    The method is from arXiv 2210.15097. The conditional distribution is the expert and the unconditional one the
    amateur. A token is kept if its probability for the expert is at least ``alpha`` times that of the expert's k-th
    likeliest token. The logit of a kept token is log expert - log amateur.

    Args:
        conditional, unconditional: logits ``[B, K]``.
        top_k: k, at least 1. 1 is the original contrastive decoding. Above K it is K.
        alpha: in (0, 1].

    Returns:
        ``[B, K]``, minus infinity where a token is not kept.
    """
    expert, amateur = conditional.log_softmax(-1), unconditional.log_softmax(-1)
    threshold = expert.topk(min(top_k, expert.size(-1)), dim=-1).values[:, -1:]
    return (expert - amateur).masked_fill(expert < threshold + torch.tensor(alpha).log(), -torch.inf)


def forwards_per_token(guidance_scale: float) -> int:
    """Return how many forward passes one token costs."""
    return 1 if guidance_scale == 0 else 2
