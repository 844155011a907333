"""Direct Preference Optimization on conditions, an ablation of CCA's Table 3 (arXiv 2410.09347; DPO: 2305.18290)."""

from __future__ import annotations

from dataclasses import dataclass

from torch.nn.functional import logsigmoid

from megatron_cca.objectives.batches import ObjectiveResult, PairLogps, must_be_positive


@dataclass(frozen=True)
class DPO:
    """L = -log sigma(beta (r(x, c) - r(x, c'))), averaged over rows; r = log p_theta - log p_phi.

    Rows with ``negative_is_positive`` get no rule of their own, as in the authors' code: their two conditions are the
    same, hence they add ln 2 to the loss and nothing to its gradient.

    Attributes:
        beta: > 0.

    Raises:
        UserError: beta not positive.
    """

    beta: float = 0.02

    batch_type = PairLogps

    def __post_init__(self) -> None:
        must_be_positive(self, "beta")

    def __call__(self, pairs: PairLogps) -> ObjectiveResult:
        """The loss over B rows, and :meth:`PairLogps.metrics`."""
        positive, negative = pairs.log_ratios()
        loss = -logsigmoid(self.beta * (positive - negative)).mean()
        return ObjectiveResult(loss, pairs)
