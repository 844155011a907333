"""What a run reports: metrics on rank 0, lines for a person, and events for ``events.jsonl``."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

import numpy as np
from PIL import Image
from tqdm import tqdm

from megatron_cca.io.external_files import json_lines
from megatron_cca.io.outputs import LineFile

METRICS_FILE, EVENTS_FILE, TENSORBOARD = "metrics.jsonl", "events.jsonl", "tensorboard"
LOGGER = logging.getLogger("megatron_cca")


class Curves:
    """TensorBoard events in a folder. If somebody removes the folder, a new one is begun.

    Args:
        folder: is created.
        first_step: TensorBoard drops what an interrupted run wrote from this step on.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        self._folder = folder
        self.writer = _event_writer(folder, first_step)

    def renewed(self, step: int) -> bool:
        """Begin a new folder if the old one was removed. Return whether it was.

        Raises:
            OSError: the folder cannot be created.
        """
        if self._folder.is_dir():
            return False
        former, self.writer = self.writer, _event_writer(self._folder, step)
        former.close()
        return True

    def close(self) -> None:
        """Write the remaining events. Raise OSError if they cannot be written."""
        self.writer.close()


class MetricsLog:
    """The log of a run: a JSON object a step in ``<output_dir>/metrics.jsonl``, the same in TensorBoard and trackers.

    Args:
        output_dir: the run's folder.
        first_step: the log drops what an interrupted run wrote from this step on.
        train_iters: the run's length, for the progress bar.
        tensorboard: whether to write TensorBoard events.
        progress_bar: whether to show a bar (only where standard error is a terminal).
        on_loss: called with a line when logs are lost. The line is also printed.
    """

    def __init__(
        self,
        output_dir: Path,
        first_step: int,
        train_iters: int,
        *,
        tensorboard: bool,
        progress_bar: bool,
        on_loss: Callable[[str], None] = lambda line: None,
    ) -> None:
        path = output_dir / METRICS_FILE
        kept = [line for line, row in json_lines(path, step=int) if row["step"] < first_step]
        path.write_text("".join(kept))
        self._path, self._file = path, LineFile(path)
        self._complained, self._on_loss, self.trackers = False, on_loss, None
        self._curves = Curves(output_dir / TENSORBOARD, first_step) if tensorboard else None
        self._bar = tqdm(
            total=train_iters,
            initial=first_step,
            desc=output_dir.name,
            unit="step",
            disable=None if progress_bar else True,
            file=sys.stderr,
            dynamic_ncols=True,
        )
        self._every = max(1, train_iters // 10)
        self._train_iters = train_iters

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.close()
        self._file.close()
        if self._curves is not None:
            with self.tolerating_a_full_disk():
                self._curves.close()

    @contextmanager
    def tolerating_a_full_disk(self) -> Iterator[None]:
        """Let the run go on without what the block cannot write. The first loss is reported."""
        try:
            yield
        except OSError as error:
            if not self._complained:
                self._lose(f"{error.filename or self._path}: {error.strerror}; the run goes on without these logs")
            self._complained = True

    def _lose(self, line: str) -> None:
        self.say(line)
        self._on_loss(line)

    def write(self, row: dict[str, float]) -> None:
        """Log one step. ``row["step"]`` counts from 0. Numbers that are not finite become null, as JSON has no NaN.

        Lines are lost if the disk is full or somebody removes the log. The run goes on.
        """
        finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
        with self.tolerating_a_full_disk():
            if self._file.append(json.dumps(finite)):
                self._lose(f"{self._path}: was removed or replaced; it goes on with step {row['step']}")
        with self.tolerating_a_full_disk():
            self._scalars({name: value for name, value in finite.items() if name != "step"}, row["step"])
        self._bar.set_postfix_str(_short(row), refresh=False)
        self._bar.update()
        done = row["step"] + 1
        if self._bar.disable and (done % self._every == 0 or done == self._train_iters):
            self.say(f"step {done}/{self._train_iters}  {_short(row)}")

    def _scalars(self, values: dict[str, float | None], step: int) -> None:
        if self.trackers is not None:
            self.trackers.scalars(step, values)
        if self._curves is None:
            return
        if self._curves.renewed(step):
            self._lose(f"{self._path.parent / TENSORBOARD}: was removed; it goes on with step {step}")
        for name, value in values.items():
            if value is not None:
                self._curves.writer.add_scalar(name, value, step)

    def show(self, name: str, picture: Path, step: int) -> None:
        """Add a PNG file to TensorBoard and the trackers. The file stays in its place."""
        if self.trackers is not None:
            self.trackers.picture(step, name, picture)
        if self._curves is not None:
            with Image.open(picture) as image:
                pixels = np.asarray(image.convert("RGB"))
            self._curves.writer.add_image(name, pixels, step, dataformats="HWC")

    def say(self, text: str) -> None:
        """Print a line without tearing the progress bar."""
        self._bar.write(text, file=sys.stdout)
        sys.stdout.flush()


def read_metrics(output_dir: Path) -> list[dict[str, float]]:
    """Return the rows of a run's metrics.jsonl, in order.

    Raises:
        UserError: a line that no run wrote. The message names it.
    """
    return [row for _, row in json_lines(output_dir / METRICS_FILE, step=int)]


class RunLog:
    """The log of one rank of a run, open within a ``with`` block.

    A record's text is for a person. Its attributes ``event`` and ``details`` are for ``events.jsonl``. Rank 0 reports
    what all ranks know. Every rank reports its own events. Programs can add handlers to the logger.

    Args:
        output_dir: the run's folder.

    Attributes:
        metrics: the metrics log. Only rank 0 sets it, before its first report; its lines are printed through it.
    """

    def __init__(self, output_dir: Path) -> None:
        self.metrics: MetricsLog | None = None
        self._handlers = (_EventFile(output_dir / EVENTS_FILE), _Terminal(self))

    def __enter__(self) -> RunLog:
        self._before = LOGGER.level, LOGGER.propagate
        LOGGER.setLevel(logging.INFO)
        # A library may have given the root logger a handler, which would print each line again.
        LOGGER.propagate = False
        for handler in self._handlers:
            LOGGER.addHandler(handler)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handler in self._handlers:
            LOGGER.removeHandler(handler)
        LOGGER.level, LOGGER.propagate = self._before

    def info(self, line: str) -> None:
        """Report a line, on rank 0."""
        if self.metrics is not None:
            LOGGER.info(line)

    def event(self, event: str, line: str = "", **details: object) -> None:
        """Report an event that all ranks know, on rank 0.

        Args:
            event: started, resumed, passed_over, forks, nothing_to_contrast, little_to_contrast, saved, save_failed,
                removed, skipped_step, alarm, stopped or finished.
            line: the text for a person; empty for an event that only the file gets.
            details: further entries, which JSON can hold.
        """
        if self.metrics is not None:
            LOGGER.info(line, extra={"event": event, "details": details})

    def own_event(self, event: str, **details: object) -> None:
        """Write an event of this rank: logs_lost, output_lost, hang or failed. Any thread may call it."""
        LOGGER.info("", extra={"event": event, "details": details})


def read_events(output_dir: Path) -> list[dict]:
    """Return the events of a run in order, without an incomplete last line.

    Raises:
        UserError: a line that no run wrote. The message names it.
    """
    return [event for _, event in json_lines(output_dir / EVENTS_FILE, event=str)]


def _event_writer(folder: Path, first_step: int):
    # Only a run with curves needs TensorBoard.
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=first_step)


def _short(row: dict[str, float]) -> str:
    shown = {
        "loss": "loss",
        "positive_log_ratio": "r+",
        "negative_log_ratio": "r-",
        "accuracy": "acc",
        "grad_norm": "gn",
        "validation_loss": "val",
    }
    values = "  ".join(f"{short} {row[name]:.4g}" for name, short in shown.items() if name in row)
    # This text replaces the metrics that are undefined then.
    values += "  nothing to contrast" * (row.get("positive_as_negative") == 1.0)
    return f"{values}  {row['samples_per_second']:.0f} samples/s"


class _Terminal(logging.Handler):
    """Prints the text of records and leaves the progress bar whole."""

    def __init__(self, log: RunLog) -> None:
        super().__init__()
        self._log = log
        # Before the handler's lock is taken: the thread that reports a hang must not wait for a blocked terminal.
        self.addFilter(lambda record: self._log.metrics is not None and bool(record.getMessage()))

    def emit(self, record: logging.LogRecord) -> None:
        self._log.metrics.say(record.getMessage())


class _EventFile(logging.Handler):
    """Appends the events among the records to a file. Every rank may append to it. A full disk does not stop a run."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._complained = False

    def createLock(self) -> None:
        """Have no lock: each event is one write, and the thread that reports a hang must not wait for another one."""
        self.lock = None

    def emit(self, record: logging.LogRecord) -> None:
        event = getattr(record, "event", None)
        if event is None:
            return
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "event": event,
            "rank": int(os.environ.get("RANK", "0")),
            # The number of restarts by torchrun itself.
            "restart": int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
            **record.details,
        }
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # One write to a file opened for appending, so that lines of several ranks do not mix.
            with self._path.open("ab", buffering=0) as file:
                file.write((json.dumps(line) + "\n").encode())
        except OSError as error:
            if not self._complained:
                print(f"megatron_cca: {self._path}: {error.strerror}; events are lost", file=sys.stderr, flush=True)
            self._complained = True
