"""What the next token is drawn from where a second, unconditional stream is asked too."""

from __future__ import annotations

import torch
from torch import Tensor


def guided_logits(conditional: Tensor, unconditional: Tensor, guidance_scale: float) -> Tensor:
    """(1 + s) conditional - s unconditional; s = 0 is guidance-free (arXiv 2410.09347, equation 3).

    Emu3's and LlamaGen's own programs call 1 + s the scale.
    """
    return conditional + guidance_scale * (conditional - unconditional)


def contrastive_logits(conditional: Tensor, unconditional: Tensor, top_k: int, alpha: float) -> Tensor:
    """Contrastive decoding with a top-k set, CD-K (CM3Leon, arXiv 2309.02591, section 3.4; after arXiv 2210.15097).

    The expert is the conditional distribution, the amateur the unconditional one. Of the tokens whose probability for
    the expert is at least ``alpha`` times that of its k-th likeliest token, the logit is log expert - log amateur; all
    others are out.

    Args:
        conditional, unconditional: logits ``[B, K]``.
        top_k: k, at least 1; 1 is the original contrastive decoding. Above K it is K.
        alpha: in (0, 1].

    Returns:
        ``[B, K]``, minus infinity where a token is out.
    """
    expert, amateur = conditional.log_softmax(-1), unconditional.log_softmax(-1)
    threshold = expert.topk(min(top_k, expert.size(-1)), dim=-1).values[:, -1:]
    return (expert - amateur).masked_fill(expert < threshold + torch.tensor(alpha).log(), -torch.inf)


def forwards_per_token(guidance_scale: float) -> int:
    """Forward passes that one token costs."""
    return 1 if guidance_scale == 0 else 2
