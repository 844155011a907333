"""From logits to a code: temperature, top-k, top-p, and the inverse of the cumulative distribution."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

# Codes whose weights are summed first and looked at one by one only where the number falls among them.
_BLOCK = 128
# In place of a code that nothing can be drawn for.
NO_CODE = -1


def drawn_codes(logits: Tensor, uniforms: Tensor, *, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Codes int64 ``[B]``, a function of the logits and of one number a row; ``NO_CODE`` where logits are no numbers.

    Args:
        logits: float32 ``[B, K]``; minus infinity rules a code out.
        uniforms: float64 ``[B]`` in [0, 1).
        temperature: divides the logits; 0 takes the likeliest code.
        top_k: only the k likeliest codes (and any as likely as the k-th) are drawn; 0 means all.
        top_p: after that, only the likeliest codes that together reach this probability (arXiv 1904.09751); 1 is all.
    """
    if temperature not in (0, 1):
        logits = logits / temperature
    top = logits.amax(-1, keepdim=True)
    greedy = temperature == 0
    codes = logits.argmax(-1, keepdim=True) if greedy else _at_random(logits, top, uniforms, top_k, top_p)
    # NaN and plus infinity show in the largest; said by a code, since whoever asks here would wait for the device.
    return torch.where(top.isfinite(), codes, NO_CODE).squeeze(1)


def _at_random(logits: Tensor, top: Tensor, uniforms: Tensor, top_k: int, top_p: float) -> Tensor:
    """``[B, 1]``."""
    weights = (logits - top).exp_()
    if 0 < top_k < logits.size(-1):
        weights *= logits >= _kth_largest(logits, top_k)
    if top_p < 1:
        weights = _nucleus(weights, top_p)
    return _inverted(weights, uniforms)


def _kth_largest(logits: Tensor, k: int) -> Tensor:
    """``[B, 1]``."""
    if logits.device.type == "cpu":
        # A third of torch.topk's time there.
        place = logits.size(-1) - k
        return torch.from_numpy(np.partition(logits.numpy(), place, axis=-1)[:, place, None])
    return logits.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)


def _nucleus(weights: Tensor, top_p: float) -> Tensor:
    """The same, 0 outside the smallest set of likeliest codes whose share is at least ``top_p``."""
    sorted_ones, order = weights.double().sort(dim=-1, descending=True)
    before = sorted_ones.cumsum(-1) - sorted_ones
    is_in = before < top_p * sorted_ones.sum(-1, keepdim=True)
    return weights * torch.empty_like(is_in).scatter_(-1, order, is_in)


def _inverted(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Where the cumulated weights first exceed ``uniforms`` times their sum, ``[B, 1]``; in float64, block by block."""
    blocks = pad(weights, (0, -weights.size(-1) % _BLOCK)).unflatten(-1, (-1, _BLOCK))
    sums = blocks.sum(-1, dtype=torch.float64)
    edges = sums.cumsum(-1)
    heights = uniforms[:, None] * edges[:, -1:]
    block = _first_above(edges, heights)
    inner = blocks.gather(1, block[..., None].expand(-1, -1, _BLOCK)).squeeze(1).double().cumsum(-1)
    heights = heights - (edges - sums).gather(1, block)
    return block * _BLOCK + _first_above(inner, heights)


def _first_above(cumulated: Tensor, heights: Tensor) -> Tensor:
    """The first place ``[B, 1]`` whose cumulated weight is above the height; rounding never leads past the last one."""
    top = cumulated[:, -1:]
    places = torch.searchsorted(cumulated, heights.minimum(top.nextafter(torch.zeros_like(top))), right=True)
    return places.clamp_(max=cumulated.size(-1) - 1)  # NaN is behind all
