"""The losses of the papers, from a plain model's log-probabilities."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def loss(name: str, policy: Callable, reference: Callable, rows, *, beta=None, weight=None, tokens=None) -> Tensor:
    """The authors' loss of one batch: means over the rows, of CCA and unlearning divided by max(lambda, 1).

    Args:
        name: of the objective.
        policy, reference: log p of the image of each row, ``[B]``, for whatever ``rows`` holds.
        rows: positives, negatives, and which of these count as positives.
        beta, weight: theirs; the weight is their lambda.
        tokens: codes of an image.
    """
    classes, negatives, counts_as_positive = rows
    if name == "next_token":
        return -policy(classes).mean() / tokens
    with torch.no_grad():
        base, negative_base = reference(classes), reference(negatives)
    ratio, negative_ratio = policy(classes) - base, policy(negatives) - negative_base
    if name == "dpo":
        return -logsigmoid(beta * (ratio - negative_ratio)).mean()
    preferences = {
        "ipo": lambda: (ratio - negative_ratio - 1 / (2 * beta)) ** 2,
        "kto": lambda: (1 - (beta * ratio).sigmoid() + weight * (1 - (-beta * negative_ratio).sigmoid())) / 2,
        "nca": lambda: -logsigmoid(beta * ratio) - (logsigmoid(-beta * ratio) + logsigmoid(-beta * negative_ratio)) / 2,
    }
    if name in preferences:
        return torch.where(counts_as_positive, 0.0, preferences[name]()).mean()
    sign, weights = torch.where(counts_as_positive, 1.0, -1.0), torch.where(counts_as_positive, 1.0, weight)
    terms = {
        "cca": lambda: -logsigmoid(beta * ratio) - weights * logsigmoid(sign * beta * negative_ratio),
        "unlearning": lambda: -ratio - weights * sign * negative_ratio,
    }
    return terms[name]().mean() / max(weight, 1.0)


def gft(policy: Callable, rows, beta: float) -> Tensor:
    """The authors' loss (arXiv 2501.15420).

    Args:
        policy: logits of rows of tokens, ``[B, S, W]``.
        rows: a microbatch, its rows with their conditions before the same images without.
        beta: theirs.
    """
    (own, null), (mask, null_mask) = rows.tokens.chunk(2), rows.mask.chunk(2)
    with torch.no_grad():
        unconditional = policy(null)[null_mask]
    mixture = beta * policy(own)[mask] + (1 - beta) * unconditional
    return torch.nn.functional.cross_entropy(mixture, rows.targets.chunk(2)[0][mask])


def ddo(policy: Callable, reference: Callable, rows, beta: float, alpha: float) -> Tensor:
    """The loss of arXiv 2503.01103. Arguments are those of :func:`loss`: rows are real images, and drawn ones."""
    real, drawn, _ = rows
    with torch.no_grad():
        base, drawn_base = reference(real), reference(drawn)
    likely, unlikely = torch.sigmoid(beta * (policy(real) - base)), torch.sigmoid(-beta * (policy(drawn) - drawn_base))
    return (-likely.log() - alpha * unlikely.log()).mean()
