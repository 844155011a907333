"""Likelihood up on matched pairs and down on mismatched ones, an ablation of CCA's Table 3 (arXiv 2410.09347)."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_cca.objectives.batches import ObjectiveResult, PairLogps, must_be_positive


@dataclass(frozen=True)
class Unlearning:
    """L = -r(x, c) + lambda r(x, c'), divided by max(lambda, 1), averaged over rows; r = log p_theta - log p_phi.

    In a row with ``negative_is_positive`` the second term is ``-r(x, c')`` with weight 1, as in the authors' code. The
    loss has no lower bound: the run must be short, or lambda small.

    Attributes:
        negative_weight: the paper's lambda, > 0.

    Raises:
        UserError: negative_weight not positive.
    """

    negative_weight: float = 1.0

    batch_type = PairLogps

    def __post_init__(self) -> None:
        must_be_positive(self, "negative_weight")

    def __call__(self, pairs: PairLogps) -> ObjectiveResult:
        """The loss over B rows, and :meth:`PairLogps.metrics`."""
        positive, negative = pairs.log_ratios()
        sign, weight = pairs.negative_signs_and_weights(self.negative_weight)
        rows = -positive - weight * sign * negative
        loss = rows.mean() / max(self.negative_weight, 1.0)
        return ObjectiveResult(loss, pairs)
