"""Guidance-Free Training with a fixed beta (Chen et al., arXiv 2501.15420)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from megatron_cca.objectives.base import Objective, objective

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_cca.objectives.base import SequenceLogps


@objective("gft")
class GFT(Objective):
    """Mean negative log-likelihood per image token, in nats, by the logits beta l(x | c) + (1 - beta) l(x | null).

    The second part is a constant: it has no gradient. If the mixture fits the data, l(x | c) alone is what guidance of
    scale s = 1 / beta - 1 would draw from. A row whose condition is dropped mixes two equal rows: it has the
    likelihood of plain training and beta x its gradient, as in the authors' code.
    """

    beta: Annotated[float, Field(gt=0, le=1)] = 0.5
    """1 / (1 + guidance scale) of the guidance that the model learns: 0.5 is scale 1. At 1 the loss is next_token's."""

    @property
    def conditional_share(self) -> float:
        """The key ``beta``."""
        return self.beta

    def loss(self, sequences: SequenceLogps) -> Tensor:
        """Return the loss over B samples."""
        return -sequences.policy.mean() / sequences.mean_num_tokens
