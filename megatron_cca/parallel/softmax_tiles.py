"""The two operations of the log-probability kernel on a tile of logits: update the running softmax, make the gradient.

A tile is fp32 (or fp64) ``[n, width]``: the logits of n tokens for ``width`` neighbouring words. ``local_targets`` is
int64 ``[n]``: the target's column, or a number outside of ``0 .. width - 1`` if the target is in another tile. This
module runs on every device. ``triton_tiles`` has the same two functions with one pass over the tile.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

import torch
from torch import Tensor


def operations_for(device: torch.device) -> ModuleType:
    """Return the module to use for tensors on ``device``: ``triton_tiles`` on a GPU with Triton, else this one."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        return importlib.import_module("megatron_cca.parallel.triton_tiles")
    return sys.modules[__name__]


def absorb(logits: Tensor, local_targets: Tensor, peak: Tensor, sum_exp: Tensor, target_logits: Tensor) -> None:
    """Add a tile to the running softmax of its tokens (online softmax, arXiv 1805.02867). Overwrites ``logits``.

    Args:
        logits: the tile. Its content is lost.
        local_targets: int64 ``[n]``.
        peak: ``[n]``, updated: the largest logit so far. Minus infinity before the first tile.
        sum_exp: ``[n]``, updated: the sum of exp(logit - peak) so far.
        target_logits: ``[n]``, updated if the target is in this tile.
    """
    column, inside = _columns(local_targets, logits.size(1))
    torch.where(inside, logits.gather(1, column).squeeze(1), target_logits, out=target_logits)
    higher = torch.maximum(peak, logits.amax(dim=1))
    sum_exp.mul_(peak.sub_(higher).exp_()).add_(logits.sub_(higher[:, None]).exp_().sum(dim=1))
    peak.copy_(higher)


def logits_gradient(
    logits: Tensor, local_targets: Tensor, peak: Tensor, sum_exp: Tensor, upstream: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return ``upstream * (onehot(target) - softmax(logits))`` of one tile, in ``dtype``. Overwrites ``logits``.

    Args:
        logits: the tile. Its content is lost.
        local_targets: int64 ``[n]``.
        peak: ``[n]``, the largest logit over all words.
        sum_exp: ``[n]``, the sum of exp(logit - peak) over all words.
        upstream: ``[n]``, the gradient of each token's log-probability.
        dtype: dtype of the result.
    """
    # Use exp(logit - peak) / sum_exp. With logits of 1e4, logsumexp in exp(logit - logsumexp) loses its digits.
    gradient = logits.sub_(peak[:, None]).exp_().mul_((-upstream / sum_exp)[:, None])
    column, inside = _columns(local_targets, logits.size(1))
    gradient.scatter_add_(1, column, (upstream * inside)[:, None])
    return gradient.to(dtype)


def _columns(local_targets: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return a valid column ``[n, 1]`` for every token, and whether it is the target's column, bool ``[n]``."""
    inside = (local_targets >= 0) & (local_targets < width)
    return local_targets.clamp(0, width - 1)[:, None], inside
