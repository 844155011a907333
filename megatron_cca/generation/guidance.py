"""Classifier-free guidance, in the paper's convention."""

from __future__ import annotations

from torch import Tensor


def guided_logits(conditional: Tensor, unconditional: Tensor, guidance_scale: float) -> Tensor:
    """(1 + s) conditional - s unconditional; s = 0 is guidance-free (arXiv 2410.09347, equation 3).

    Emu3's and LlamaGen's own programs call 1 + s the scale.
    """
    return conditional + guidance_scale * (conditional - unconditional)


def forwards_per_token(guidance_scale: float) -> int:
    """Forward passes that one token costs."""
    return 1 if guidance_scale == 0 else 2
