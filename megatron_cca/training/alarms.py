"""Signs that a run goes wrong while its numbers are still numbers: a loss that jumps, a policy that collapses."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from statistics import fmean, median

from megatron_cca.config import Config

_WINDOW, _LEAST = 50, 10
_SMOOTHED = 10
# The standard deviation of a normal distribution, in units of its median absolute deviation.
_MAD_TO_SD = 1.4826


class Alarms:
    """The alarms of a run, from the metrics of each step. They are the same on every rank, since the metrics are.

    Args:
        config: of the run. ``faults`` has the limits.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._losses: deque[float] = deque(maxlen=_WINDOW)
        self._log_ratios: deque[float] = deque(maxlen=_SMOOTHED)
        self._is_low = False

    def after(self, metrics: Mapping[str, float], image_tokens: float) -> list[str]:
        """Return the alarms after a step, one line each, with advice.

        Args:
            metrics: the objective's metrics, all finite.
            image_tokens: mean number of image tokens of a row.
        """
        found = [self._spike(metrics["loss"]), self._collapse(metrics.get("positive_log_ratio"), image_tokens)]
        return [line for line in found if line is not None]

    def _spike(self, loss: float) -> str | None:
        before, limit = list(self._losses), self._config.faults.loss_spike
        self._losses.append(loss)
        if limit is None or len(before) < _LEAST:
            return None
        usual = median(before)
        # A loss that hardly moves must not make every move a spike.
        spread = max(_MAD_TO_SD * median(abs(value - usual) for value in before), 0.01 * abs(usual))
        if loss <= usual + limit * spread:
            return None
        return (
            f"loss {loss:.4g} jumped {(loss - usual) / spread:.0f} times its usual spread above {usual:.4g} (faults."
            f"loss_spike {limit:g}): look at the data of this step; if it recurs, lower optimizer.lr "
            f"({self._config.optimizer.lr:g}) or optimizer.clip_grad, or warm up longer"
        )

    def _collapse(self, log_ratio: float | None, image_tokens: float) -> str | None:
        floor = self._config.faults.positive_log_ratio_floor
        if log_ratio is None or floor is None:
            return None
        self._log_ratios.append(log_ratio / image_tokens)
        if len(self._log_ratios) < _SMOOTHED:
            return None
        was_low, self._is_low = self._is_low, fmean(self._log_ratios) < floor
        if was_low or not self._is_low:
            return None
        return (
            f"the positive log-ratio has fallen to {fmean(self._log_ratios):.3g} nats an image token (faults."
            f"positive_log_ratio_floor {floor:g}): the policy forgets the images that it is trained on, the road to "
            f"collapse; {self._advice()}"
        )

    def _advice(self) -> str:
        own, rate = self._config.objective.collapse_advice, f"lower optimizer.lr ({self._config.optimizer.lr:g})"
        return f"{own} or {rate}" if own else rate
