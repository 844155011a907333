"""Next-token likelihood of the image tokens, for pretraining and for the compute-matched control."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_cca.objectives.batches import ObjectiveResult, SequenceLogps


@dataclass(frozen=True)
class NextToken:
    """Mean negative log-likelihood per image token, in nats."""

    batch_type = SequenceLogps

    def __call__(self, sequences: SequenceLogps) -> ObjectiveResult:
        """The loss over B rows; its only metric is itself."""
        loss = -sequences.policy.mean() / sequences.mean_num_tokens
        return ObjectiveResult(loss, sequences)
