"""What objectives take and give."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PairLogps:
    """Summed log-probabilities of the image tokens of B samples, in nats; float ``[B]`` each.

    Attributes:
        policy_positive: log p_theta(x | c), the sample's own condition.
        policy_negative: log p_theta(x | c'), a condition that does not belong to the sample.
        reference_positive: log p_phi(x | c) of the frozen reference.
        reference_negative: log p_phi(x | c').
        negative_is_positive: bool ``[B]``; rows whose "negative" is to count as a positive, because the condition was
            dropped or because no different condition could be found.
    """

    policy_positive: Tensor
    policy_negative: Tensor
    reference_positive: Tensor
    reference_negative: Tensor
    negative_is_positive: Tensor

    def log_ratios(self) -> tuple[Tensor, Tensor]:
        """log(p_theta / p_phi) of positives and negatives, float ``[B]`` each."""
        return self.policy_positive - self.reference_positive, self.policy_negative - self.reference_negative


@dataclass(frozen=True)
class SequenceLogps:
    """Summed log-probabilities of the image tokens of B samples.

    Attributes:
        policy: log p_theta(x | c), float ``[B]``, nats.
        mean_num_tokens: image tokens per sample, averaged over the *global* batch, so that the loss does not depend on
            how the batch is cut into microbatches.
    """

    policy: Tensor
    mean_num_tokens: float


@dataclass(frozen=True)
class ObjectiveResult:
    """A differentiable scalar ``loss`` and detached scalar ``metrics``."""

    loss: Tensor
    metrics: dict[str, Tensor]


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``values`` where ``mask`` holds; 0 where it holds nowhere. Both ``[B]``; returns a scalar."""
    weights = mask.to(values.dtype)
    return (torch.where(mask, values, torch.zeros_like(values))).sum() / weights.sum().clamp(min=1)
