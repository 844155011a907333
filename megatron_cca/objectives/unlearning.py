"""Likelihood up on matched pairs and down on mismatched ones, an ablation of CCA's Table 3 (arXiv 2410.09347)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_cca.keys import PositiveFloat
from megatron_cca.objectives.base import PairObjective, objective

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_cca.objectives.base import PairLogps


@objective("unlearning")
class Unlearning(PairObjective):
    """L = -r(x, c) + lambda r(x, c'), divided by max(lambda, 1), averaged over rows; r = log p_theta - log p_phi.

    In a row with ``negative_is_positive`` the second term is ``-r(x, c')`` with weight 1, as in the authors' code. The
    loss has no lower bound: the run must be short, or lambda small. Its gradient does not depend on the reference.
    """

    negative_weight: PositiveFloat = 1.0
    """The paper's lambda: weight of the mismatched pairs."""

    contrasts = ("conditions",)
    against_collapse = "lower objective.negative_weight ({negative_weight:g}),"

    def loss(self, pairs: PairLogps) -> Tensor:
        """Return the loss over B rows."""
        positive, negative = pairs.log_ratios()
        sign, weight = pairs.negative_signs_and_weights(self.negative_weight)
        rows = -positive - weight * sign * negative
        return rows.mean() / max(self.negative_weight, 1.0)
