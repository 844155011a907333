"""What objectives take: summed log-probabilities of rows, with the metrics that come of them."""

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

    def negative_signs_and_weights(self, negative_weight: float) -> tuple[Tensor, Tensor]:
        """The authors' row rules: sign and weight of each row's negative term, float ``[B]`` each.

        -1 and ``negative_weight`` for a true negative; +1 and 1 where the "negative" counts as a positive, which keeps
        the unconditional model intact.
        """
        import torch  # here, since reading keys needs no torch

        flagged, dtype = self.negative_is_positive, self.policy_negative.dtype
        return torch.where(flagged, 1.0, -1.0).to(dtype), torch.where(flagged, 1.0, negative_weight).to(dtype)

    def metrics(self, loss: Tensor) -> dict[str, Tensor]:
        """What every objective on pairs reports, scalars, in nats.

        ``positive_log_ratio`` is the mean over all rows; ``negative_log_ratio``, ``margin`` (mean positive minus
        negative log-ratio) and ``accuracy`` (share with positive > negative) are over the rows with a true negative;
        ``positive_as_negative`` is the share of the other rows. Where no row has a true negative, these three are
        undefined and left out.
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
            how the batch is cut into microbatches.
    """

    policy: Tensor
    mean_num_tokens: float

    def metrics(self, loss: Tensor) -> dict[str, Tensor]:
        """The loss is the only one."""
        return {"loss": loss.detach()}


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``values`` where ``mask`` holds, which it does somewhere. Both ``[B]``; returns a scalar."""
    return values.masked_fill(~mask, 0).sum() / mask.to(values.dtype).sum()
