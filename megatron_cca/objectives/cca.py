"""Condition Contrastive Alignment (Chen et al., arXiv 2410.09347, equations 11 and 12)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_cca.keys import PositiveFloat
from megatron_cca.objectives.base import PairObjective, objective

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_cca.objectives.base import PairLogps


@objective("cca")
class CCA(PairObjective):
    """L = -log sigma(beta r(x, c)) - lambda log sigma(-beta r(x, c')), divided by max(lambda, 1), averaged over rows.

    r = log p_theta - log p_phi. In a row with ``negative_is_positive`` the second term is
    ``-log sigma(+beta r(x, c'))`` with weight 1, as in the authors' code.
    """

    beta: PositiveFloat = 0.02
    """1 / guidance scale. The paper's 0.02 is for 576 image tokens. Scale it with 1 / the number of image tokens."""
    negative_weight: PositiveFloat = 1.0
    """The paper's lambda: larger means more fidelity and less diversity."""

    contrasts = ("conditions",)
    reward_scale = "beta"
    against_collapse = "lower objective.negative_weight ({negative_weight:g}), raise objective.beta ({beta:g})"

    def loss(self, pairs: PairLogps) -> Tensor:
        """Return the loss over B rows."""
        from torch.nn.functional import logsigmoid  # here, since reading keys needs no torch

        positive, negative = pairs.log_ratios()
        sign, weight = pairs.negative_signs_and_weights(self.negative_weight)
        rows = -logsigmoid(self.beta * positive) - weight * logsigmoid(sign * self.beta * negative)
        return rows.mean() / max(self.negative_weight, 1.0)
