"""Kahneman-Tversky Optimization on pairs (Ethayarajh et al., arXiv 2402.01306)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_cca.keys import PositiveFloat
from megatron_cca.objectives.base import PairObjective, objective

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_cca.objectives.base import PairLogps


@objective("kto")
class KTO(PairObjective):
    """L = (1 - sigma(beta r_w) + lambda (1 - sigma(-beta r_l))) / 2, averaged over rows; r = log p_theta - log p_phi.

    r_w and r_l are of the first, desirable row of a pair and of the second, undesirable one: r(x, c) and r(x, c'), or
    r(x, c) and r(x', c). The paper subtracts a reference point z_0 from each, a mean over the batch. Here z_0 = 0: a
    mean over a microbatch would make the loss depend on how the batch is split. Rows with ``negative_is_positive``
    count as 0 and add nothing to the gradient: the paper has no rule for them.
    """

    beta: PositiveFloat = 0.02
    """Scale of the log-ratios; larger keeps the policy closer to the reference."""
    negative_weight: PositiveFloat = 1.0
    """The paper's lambda_U / lambda_D: weight of the undesirable rows."""

    contrasts = ("conditions", "images")
    reward_scale = "beta"
    against_collapse = "lower objective.negative_weight ({negative_weight:g}), raise objective.beta ({beta:g})"
    without_contrast = "learns nothing"

    def loss(self, pairs: PairLogps) -> Tensor:
        """Return the loss over B rows."""
        desirable, undesirable = pairs.log_ratios()
        rows = (-self.beta * desirable).sigmoid() + self.negative_weight * (self.beta * undesirable).sigmoid()
        return pairs.mean_of_contrasts(rows) / 2
