"""Noise Contrastive Alignment of pairs (Chen et al., arXiv 2402.05369)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_cca.keys import PositiveFloat
from megatron_cca.objectives.base import PairObjective, objective

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_cca.objectives.base import PairLogps


@objective("nca")
class NCA(PairObjective):
    """L = -log sigma(beta r_w) - 1/2 (log sigma(-beta r_w) + log sigma(-beta r_l)), averaged over rows.

    r = log p_theta - log p_phi of the first and the second row of a pair: r(x, c) and r(x, c'), or r(x, c) and
    r(x', c). DPO only raises their difference. This keeps r_w from falling. Rows with ``negative_is_positive`` count
    as 0 and add nothing to the gradient: the paper has no rule for them.
    """

    beta: PositiveFloat = 0.02
    """Scale of the log-ratios; larger keeps the policy closer to the reference."""

    contrasts = ("conditions", "images")
    reward_scale = "beta"
    against_collapse = "raise objective.beta ({beta:g})"
    without_contrast = "learns nothing"

    def loss(self, pairs: PairLogps) -> Tensor:
        """Return the loss over B rows."""
        from torch.nn.functional import logsigmoid  # here, since reading keys needs no torch

        winner, loser = (self.beta * ratio for ratio in pairs.log_ratios())
        return pairs.mean_of_contrasts(-logsigmoid(winner) - (logsigmoid(-winner) + logsigmoid(-loser)) / 2)
