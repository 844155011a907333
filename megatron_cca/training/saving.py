"""Begin saves during training, wait for them, and report them. A signal makes a run finish its step, save, and stop."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from types import FrameType

from megatron_cca import platform
from megatron_cca.checkpoint.saver import Saved
from megatron_cca.checkpoint.summary import summarize
from megatron_cca.terminal import STOPPING, handle, restore
from megatron_cca.training.resuming import STARTED_FROM
from megatron_cca.training.run_log import RunLog
from megatron_cca.training.setup import Run

# A disk is slower than a device, and many ranks may write to it at once.
_PATIENCE = 6.0
# A terminal and a launcher may both send the signal of one Ctrl-C.
_SAME_SECONDS = 1.0


def warn_of_fork(run: Run, log: RunLog) -> None:
    """Warn of the risk of ``training.async_save`` on a GPU, where it is on only if a user sets it."""
    if platform.current().is_cuda and run.config.training.async_save:
        line = (
            "training.async_save: true forks this process at each save, which CUDA does not support after its start; "
            "if a save hangs or a process dies, set it to null, which waits for each save"
        )
        log.event("forks", line)


def save_checkpoint(run: Run, log: RunLog) -> None:
    """Begin to save the run's state at its current step. Collective over all ranks."""
    report_finished_saves(run, begin_save(run), log)


def begin_save(run: Run) -> list[Saved]:
    """Begin a save as :func:`save_checkpoint` does. Return the saves that ended meanwhile."""
    run.progress.at("saving", patience=_PATIENCE)
    run.gather_parameters()
    summary = {**summarize(run.config, run.batches.data.fingerprint()), STARTED_FROM: run.started_from}
    return run.saver.save(run.iteration, run.policy_chunks, run.optimizer, summary)


def finish_saves(run: Run, log: RunLog) -> None:
    """Wait for the saves in progress. Collective over all ranks."""
    run.progress.at("saving", patience=_PATIENCE)
    report_finished_saves(run, run.saver.finish(), log)


def report_finished_saves(run: Run, ended: list[Saved], log: RunLog) -> None:
    """Report how saves ended. Training goes on after a save that failed."""
    for saved in ended:
        if saved.problem is not None:
            goes_on = "; training goes on" if run.iteration < run.config.training.train_iters else ""
            line = f"step {saved.iteration} could not be saved: {saved.problem}{goes_on}"
            log.event("save_failed", line, step=saved.iteration, reason=saved.problem)
            continue
        times = {"seconds": round(saved.seconds, 3), "waited_seconds": round(saved.waited_seconds, 3)}
        log.event("saved", f"saved {run.checkpoints} at step {saved.iteration}", step=saved.iteration, **times)
        if saved.removed:
            log.event("removed", steps=list(saved.removed))


class StopRequest:
    """A block that records the first signal of :data:`terminal.STOPPING`, so that it does not end the process.

    A later Ctrl-C raises KeyboardInterrupt.

    Attributes:
        number: of the signal that came. 0 while none has come.
    """

    def __init__(self) -> None:
        self.number = 0
        self._came = 0.0
        self._before: dict = {}

    def __enter__(self) -> StopRequest:
        self._before = handle(STOPPING, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        restore(self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.number:
            if number == signal.SIGINT and now - self._came > _SAME_SECONDS:
                raise KeyboardInterrupt
            return
        self.number, self._came = number, now
        if number == signal.SIGINT and os.environ.get("RANK", "0") == "0":
            # Not print, since the signal may have interrupted one.
            with contextlib.suppress(OSError):
                os.write(2, b"\nmegatron_cca: the run ends this step and saves; Ctrl-C again ends it at once\n")
