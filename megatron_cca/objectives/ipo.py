"""Identity preference optimization (Azar et al., arXiv 2310.12036)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_cca.keys import PositiveFloat
from megatron_cca.objectives.base import PairObjective, objective

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_cca.objectives.base import PairLogps


@objective("ipo")
class IPO(PairObjective):
    """L = (r_w - r_l - 1 / (2 beta))^2, averaged over rows; r = log p_theta - log p_phi.

    r_w and r_l are of the first and the second row of a pair: r(x, c) and r(x, c'), or r(x, c) and r(x', c). Rows with
    ``negative_is_positive`` count as 0 and add nothing to the gradient: between two equal rows there is no difference.
    """

    beta: PositiveFloat = 0.1
    """The paper's tau. It draws the difference of the two log-ratios to 1 / (2 beta) nats."""

    contrasts = ("conditions", "images")
    reward_scale = "beta"
    against_collapse = "raise objective.beta ({beta:g})"
    without_contrast = "learns nothing"

    def loss(self, pairs: PairLogps) -> Tensor:
        """Return the loss over B rows."""
        positive, negative = pairs.log_ratios()
        return pairs.mean_of_contrasts((positive - negative - 1 / (2 * self.beta)).square())
