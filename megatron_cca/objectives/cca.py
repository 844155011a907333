"""Condition Contrastive Alignment (Chen et al., arXiv 2410.09347, equations 11 and 12)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid

from megatron_cca.errors import UserError
from megatron_cca.objectives.batches import ObjectiveResult, PairLogps, masked_mean


@dataclass(frozen=True)
class CCA:
    """L = -log sigma(beta r(x, c)) - lambda log sigma(-beta r(x, c')), divided by max(lambda, 1), averaged over rows.

    r = log p_theta - log p_phi. In a row with ``negative_is_positive`` the second term is
    ``-log sigma(+beta r(x, c'))`` with weight 1, as in the authors' code: this keeps the unconditional model intact.

    Attributes:
        beta: > 0; plays 1 / guidance scale.
        negative_weight: the paper's lambda, > 0.

    Raises:
        UserError: beta or negative_weight not positive.
    """

    beta: float = 0.02
    negative_weight: float = 1.0

    batch_type = PairLogps

    def __post_init__(self) -> None:
        for key in ("beta", "negative_weight"):
            if not getattr(self, key) > 0:
                raise UserError(f"objective.{key}: must be greater than 0, found {getattr(self, key)}")

    def __call__(self, pairs: PairLogps) -> ObjectiveResult:
        """The loss over B rows and its metrics.

        Metrics are in nats: ``positive_log_ratio`` is the mean over all rows; ``negative_log_ratio``, ``margin`` (mean
        positive minus negative log-ratio) and ``accuracy`` (share with positive > negative) are over the rows with a
        true negative; ``positive_as_negative`` is the share of the other rows.
        """
        positive, negative = pairs.log_ratios()
        flagged = pairs.negative_is_positive
        sign = torch.where(flagged, 1.0, -1.0).to(negative.dtype)
        weight = torch.where(flagged, 1.0, self.negative_weight).to(negative.dtype)
        rows = -logsigmoid(self.beta * positive) - weight * logsigmoid(sign * self.beta * negative)
        loss = rows.mean() / max(self.negative_weight, 1.0)
        with torch.no_grad():
            true_negative = ~flagged
            metrics = {
                "loss": loss.detach(),
                "positive_log_ratio": positive.mean(),
                "negative_log_ratio": masked_mean(negative, true_negative),
                "margin": masked_mean(positive - negative, true_negative),
                "accuracy": masked_mean((positive > negative).to(positive.dtype), true_negative),
                "positive_as_negative": flagged.to(positive.dtype).mean(),
            }
        return ObjectiveResult(loss, metrics)
