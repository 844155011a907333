"""Direct Preference Optimization on conditions, an ablation of CCA's Table 3 (arXiv 2410.09347; DPO: 2305.18290)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_cca.keys import PositiveFloat
from megatron_cca.objectives.base import PairObjective, objective

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_cca.objectives.base import PairLogps


@objective("dpo")
class DPO(PairObjective):
    """L = -log sigma(beta (r(x, c) - r(x, c'))), averaged over rows; r = log p_theta - log p_phi.

    Rows with ``negative_is_positive`` get no rule of their own, as in the authors' code: their two conditions are the
    same, hence they add ln 2 to the loss and nothing to its gradient.
    """

    beta: PositiveFloat = 0.02
    """Scale of the log-ratios; larger keeps the policy closer to the reference."""

    contrasts = ("conditions", "images")
    reward_scale = "beta"
    against_collapse = "raise objective.beta ({beta:g})"
    without_contrast = "learns nothing, its loss is ln 2"

    def loss(self, pairs: PairLogps) -> Tensor:
        """Return the loss over B rows."""
        from torch.nn.functional import logsigmoid  # here, since reading keys needs no torch

        positive, negative = pairs.log_ratios()
        return -logsigmoid(self.beta * (positive - negative)).mean()
