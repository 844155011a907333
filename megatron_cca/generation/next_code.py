"""From logits to the next code: guidance, temperature, top-k, top-p, then inverse transform sampling."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad


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


# Codes per block. The sums of blocks are searched first, then the codes of one block.
_BLOCK = 128
# Stands for a code where none can be drawn.
NO_CODE = -1


def draw_codes(logits: Tensor, uniforms: Tensor, *, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Return codes int64 ``[B]``, drawn from the logits with one random number per row.

    The codes depend on the arguments alone. A row whose logits are not finite gets ``NO_CODE``.

    Args:
        logits: float32 ``[B, K]``. Minus infinity rules a code out.
        uniforms: float64 ``[B]`` in [0, 1).
        temperature: divides the logits. 0 takes the likeliest code.
        top_k: only the k likeliest codes (and any as likely as the k-th) are drawn. 0 means all.
        top_p: after that, only the likeliest codes that together reach this probability (arXiv 1904.09751). 1 is all.
    """
    if temperature not in (0, 1):
        logits = logits / temperature
    top = logits.amax(-1, keepdim=True)
    greedy = temperature == 0
    codes = logits.argmax(-1, keepdim=True) if greedy else _at_random(logits, top, uniforms, top_k, top_p)
    # NaN and plus infinity show in the maximum. A code says so, since a check here would wait for the device.
    return torch.where(top.isfinite(), codes, NO_CODE).squeeze(1)


def _at_random(logits: Tensor, top: Tensor, uniforms: Tensor, top_k: int, top_p: float) -> Tensor:
    """Return a random code for each row, ``[B, 1]``."""
    weights = (logits - top).exp_()
    if 0 < top_k < logits.size(-1):
        weights *= logits >= _kth_largest(logits, top_k)
    if top_p < 1:
        weights = _nucleus(weights, top_p)
    return _inverted(weights, uniforms)


def _kth_largest(logits: Tensor, k: int) -> Tensor:
    """Return the k-th largest logit of each row, ``[B, 1]``."""
    if logits.device.type == "cpu":
        # Takes a third of the time of torch.topk on a CPU.
        place = logits.size(-1) - k
        return torch.from_numpy(np.partition(logits.numpy(), place, axis=-1)[:, place, None])
    return logits.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)


def _nucleus(weights: Tensor, top_p: float) -> Tensor:
    """Return the weights with 0 outside the smallest set of likeliest codes whose share is at least ``top_p``."""
    sorted_ones, order = weights.double().sort(dim=-1, descending=True)
    before = sorted_ones.cumsum(-1) - sorted_ones
    is_in = before < top_p * sorted_ones.sum(-1, keepdim=True)
    return weights * torch.empty_like(is_in).scatter_(-1, order, is_in)


def _inverted(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Return the first code whose cumulated weight exceeds ``uniforms`` times the sum of weights, ``[B, 1]``.

    Sums are float64. Blocks are searched first, then the codes of one block.
    """
    blocks = pad(weights, (0, -weights.size(-1) % _BLOCK)).unflatten(-1, (-1, _BLOCK))
    sums = blocks.sum(-1, dtype=torch.float64)
    edges = sums.cumsum(-1)
    heights = uniforms[:, None] * edges[:, -1:]
    block = _first_above(edges, heights)
    inner = blocks.gather(1, block[..., None].expand(-1, -1, _BLOCK)).squeeze(1).double().cumsum(-1)
    heights = heights - (edges - sums).gather(1, block)
    return block * _BLOCK + _first_above(inner, heights)


def _first_above(cumulated: Tensor, heights: Tensor) -> Tensor:
    """Return the first place whose cumulated weight is above the height, ``[B, 1]``.

    Rounding never leads past the last one.
    """
    top = cumulated[:, -1:]
    places = torch.searchsorted(cumulated, heights.minimum(top.nextafter(torch.zeros_like(top))), right=True)
    return places.clamp_(max=cumulated.size(-1) - 1)  # searchsorted puts NaN behind the last place
