"""React to bad numbers: leave an update out, give an alarm, or end the run."""

from __future__ import annotations

from typing import NoReturn

from megatron_cca.errors import UserError
from megatron_cca.training.alarms import Alarms
from megatron_cca.training.events import RunLog
from megatron_cca.training.saving import finish_saves, save_checkpoint
from megatron_cca.training.setup import Run
from megatron_cca.training.step import DataLost, StepReport


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
