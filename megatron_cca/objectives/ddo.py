"""Direct Discriminative Optimization (Zheng et al., arXiv 2503.01103)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_cca.keys import PositiveFloat
from megatron_cca.objectives.base import PairObjective, objective

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_cca.objectives.base import PairLogps


@objective("ddo")
class DDO(PairObjective):
    """L = -log sigma(beta r(x, c)) - alpha log sigma(-beta r(x', c)), averaged over rows; r = log p_theta - log p_phi.

    x' is an image that the reference drew for the condition of x. Unlike CCA's, the sum is not divided by anything.
    Where the condition is dropped, both rows are read without one, and the contrast stays: over all conditions the
    reference's images are its unconditional ones. Pairs of images have no rows with ``negative_is_positive``.
    """

    beta: PositiveFloat = 0.02
    """Scale of the log-ratios; larger keeps the policy closer to the reference. Scale it with 1 / the number of image
    tokens."""
    alpha: PositiveFloat = 1.0
    """Weight of the drawn images."""

    contrasts = ("images",)
    reference_draws_partners = True
    reward_scale = "beta"
    against_collapse = "lower objective.alpha ({alpha:g}), raise objective.beta ({beta:g})"

    def loss(self, pairs: PairLogps) -> Tensor:
        """Return the loss over B rows."""
        from torch.nn.functional import logsigmoid  # here, since reading keys needs no torch

        real, drawn = pairs.log_ratios()
        return (-logsigmoid(self.beta * real) - self.alpha * logsigmoid(-self.beta * drawn)).mean()
