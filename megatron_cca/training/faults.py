"""React to bad numbers and to signs of a run that goes wrong: leave an update out, give an alarm, or end the run."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from statistics import fmean, median
from typing import NoReturn

from megatron_cca.config import Config
from megatron_cca.errors import UserError
from megatron_cca.training.run_log import RunLog
from megatron_cca.training.saving import finish_saves, save_checkpoint
from megatron_cca.training.setup import Run
from megatron_cca.training.step import DataLost, StepReport

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


class Diverged(UserError):
    """The error of a run that ends because loss or gradients are not finite. All ranks raise it at the same step.

    Attributes:
        how: the step, and what is not finite, in one line.
    """

    def __init__(self, how: str, advice: str) -> None:
        super().__init__(f"{how}; nothing of it is saved; {advice}")
        self.how = how


def skipped_in_a_row(run: Run, report: StepReport, before: int, log: RunLog) -> int:
    """Return how many updates in a row were left out so far. Collective over all ranks.

    Raises:
        Diverged: ``faults`` says that the run must end. Its saves in progress are finished first.
    """
    if report.problem is None:
        return 0
    faults, step = run.config.faults, run.iteration - 1
    if faults.non_finite == "skip" and before < faults.max_skipped_steps:
        line = f"step {step}: {report.problem}; this update is left out"
        log.event("skipped_step", line, step=step, reason=report.problem)
        return before + 1
    finish_saves(run, log)
    advice = (
        f"{before} updates before it were left out already (faults.max_skipped_steps)"
        if before
        else "lower optimizer.lr, look at the data of this step, or set faults.non_finite=skip to leave it out"
    )
    raise Diverged(f"step {step}: {report.problem}", advice)


def stop_without_data(run: Run, lost: DataLost, log: RunLog) -> NoReturn:
    """Save the steps that were trained before data was lost, and end the run. Collective over all ranks.

    Raises:
        UserError: always. The message says what could not be read, and which step is saved.
    """
    if run.iteration and run.saver.last_saved != run.iteration:
        save_checkpoint(run, log)
    finish_saves(run, log)
    kept = "nothing is saved" if run.saver.last_saved is None else f"step {run.saver.last_saved} is saved"
    raise UserError(f"{lost}; {kept} in {run.config.training.output_dir}; mend it, then the same command continues")


def check_alarms(run: Run, alarms: Alarms, report: StepReport, log: RunLog) -> None:
    """Report the alarms after a step. Collective over all ranks.

    Raises:
        UserError: there is an alarm, and ``faults.on_alarm`` is stop. The run is saved first.
    """
    if report.problem is not None:
        return
    for line in alarms.after(report.metrics, report.image_tokens):
        log.event("alarm", f"alarm at step {run.iteration - 1}: {line}", step=run.iteration - 1, reason=line)
        if run.config.faults.on_alarm == "stop":
            save_checkpoint(run, log)
            finish_saves(run, log)
            raise UserError(f"step {run.iteration - 1}: {line} (faults.on_alarm is stop)")
