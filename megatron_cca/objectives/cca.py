"""Condition Contrastive Alignment (Chen et al., arXiv 2410.09347, equations 11 and 12)."""

from __future__ import annotations

from dataclasses import dataclass

from torch.nn.functional import logsigmoid

from megatron_cca.objectives.batches import ObjectiveResult, PairLogps, must_be_positive


@dataclass(frozen=True)
class CCA:
    """L = -log sigma(beta r(x, c)) - lambda log sigma(-beta r(x, c')), divided by max(lambda, 1), averaged over rows.

    r = log p_theta - log p_phi. In a row with ``negative_is_positive`` the second term is
    ``-log sigma(+beta r(x, c'))`` with weight 1, as in the authors' code.

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
        must_be_positive(self, "beta", "negative_weight")

    def __call__(self, pairs: PairLogps) -> ObjectiveResult:
        """The loss over B rows, and :meth:`PairLogps.metrics`."""
        positive, negative = pairs.log_ratios()
        sign, weight = pairs.negative_signs_and_weights(self.negative_weight)
        rows = -logsigmoid(self.beta * positive) - weight * logsigmoid(sign * self.beta * negative)
        loss = rows.mean() / max(self.negative_weight, 1.0)
        return ObjectiveResult(loss, pairs)
