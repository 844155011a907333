"""The inputs of objectives: summed log-probabilities of rows, and their metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PairLogps:
    """Summed log-probabilities of the image tokens of B samples, in nats; float ``[B]`` each.

    Attributes:
        policy_positive: log p_theta(x | c), the sample's own condition.
        policy_negative: log p_theta(x | c'), a condition that does not belong to the sample.
        reference_positive: log p_phi(x | c) of the frozen reference.
        reference_negative: log p_phi(x | c').
        negative_is_positive: bool ``[B]``. True for rows whose "negative" counts as a positive, because the condition
            was dropped or no different condition was found.
    """

    policy_positive: Tensor
    policy_negative: Tensor
    reference_positive: Tensor
    reference_negative: Tensor
    negative_is_positive: Tensor

    def log_ratios(self) -> tuple[Tensor, Tensor]:
        """Return log(p_theta / p_phi) of positives and negatives, float ``[B]`` each."""
        return self.policy_positive - self.reference_positive, self.policy_negative - self.reference_negative

    def negative_signs_and_weights(self, negative_weight: float) -> tuple[Tensor, Tensor]:
        """Return sign and weight of each row's negative term by the authors' rules, float ``[B]`` each.

        A true negative has -1 and ``negative_weight``. A "negative" that counts as a positive has +1 and 1, which keeps
        the unconditional model intact.
        """
        import torch  # here, since reading keys needs no torch

        flagged, dtype = self.negative_is_positive, self.policy_negative.dtype
        return torch.where(flagged, 1.0, -1.0).to(dtype), torch.where(flagged, 1.0, negative_weight).to(dtype)

    def metrics(self, loss: Tensor) -> dict[str, Tensor]:
        """Return the metrics of every objective on pairs, scalars, in nats.

        ``positive_log_ratio`` is the mean over all rows. ``negative_log_ratio``, ``margin`` (mean positive minus
        negative log-ratio) and ``accuracy`` (share with positive > negative) are over the rows with a true negative.
        ``positive_as_negative`` is the share of the other rows. If no row has a true negative, the three metrics over
        these rows are undefined and left out.
        """
        import torch  # here, since reading keys needs no torch

        with torch.no_grad():
            positive, negative = self.log_ratios()
            true_negative = ~self.negative_is_positive
            found = {"loss": loss.detach(), "positive_log_ratio": positive.mean()}
            if true_negative.any():
                found["negative_log_ratio"] = _masked_mean(negative, true_negative)
                found["margin"] = _masked_mean(positive - negative, true_negative)
                found["accuracy"] = _masked_mean((positive > negative).to(positive.dtype), true_negative)
            return found | {"positive_as_negative": self.negative_is_positive.to(positive.dtype).mean()}


@dataclass(frozen=True)
class SequenceLogps:
    """Summed log-probabilities of the image tokens of B samples.

    Attributes:
        policy: log p_theta(x | c), float ``[B]``, nats.
        mean_num_tokens: image tokens per sample, averaged over the *global* batch, so that the loss does not depend on
            the number of microbatches.
    """

    policy: Tensor
    mean_num_tokens: float

    def metrics(self, loss: Tensor) -> dict[str, Tensor]:
        """Return the loss, the only metric."""
        return {"loss": loss.detach()}


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of ``values`` where ``mask`` holds, a scalar. Both are ``[B]``. The mask must hold somewhere."""
    return values.masked_fill(~mask, 0).sum() / mask.to(values.dtype).sum()
