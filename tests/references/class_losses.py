"""The losses of the papers for models of classes, from a plain model's log-probabilities."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def loss(name: str, policy: Callable, reference: Callable, rows, *, beta=None, weight=None, tokens=None) -> Tensor:
    """The authors' loss of one batch: means over the rows, of CCA and unlearning divided by max(lambda, 1).

    Args:
        name: of the objective.
        policy, reference: log p of each row's codes for classes ``[B]``, as ``[B]``.
        rows: of :func:`tests.references.llamagen.conditions`.
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


def gft(plain, weights, rows, codes, beta):
    """The authors' loss (arXiv 2501.15420)."""
    classes, null, _ = rows
    with torch.no_grad():
        unconditional = plain.logits(weights, null, codes)
    mixture = beta * plain.logits(weights, classes, codes) + (1 - beta) * unconditional
    return torch.nn.functional.cross_entropy(mixture.flatten(0, 1), codes.flatten())


def ddo(plain, policy, reference, classes, codes, drawn, objective):
    """The loss of arXiv 2503.01103 for real images and drawn ones of the same classes."""
    real, model = (
        plain.logps(policy, classes, codes=shown) - plain.logps(reference, classes, codes=shown).detach()
        for shown in (codes, drawn)
    )
    likely, unlikely = torch.sigmoid(objective.beta * real), torch.sigmoid(-objective.beta * model)
    return (-likely.log() - objective.alpha * unlikely.log()).mean()
