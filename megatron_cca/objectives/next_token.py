"""Next-token likelihood of the image tokens, for pretraining and for the compute-matched control."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_cca.objectives.base import Objective, objective

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_cca.objectives.base import SequenceLogps


@objective("next_token")
class NextToken(Objective):
    """Mean negative log-likelihood per image token, in nats."""

    is_plain_likelihood = True

    def loss(self, sequences: SequenceLogps) -> Tensor:
        """Return the loss over B rows."""
        return -sequences.policy.mean() / sequences.mean_num_tokens
