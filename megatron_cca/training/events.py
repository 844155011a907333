"""The reports of a run, by the logger ``megatron_cca``: lines for a person, and events for ``events.jsonl``."""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from megatron_cca.io.external_files import json_lines
from megatron_cca.training.metrics import MetricsLog

FILE = "events.jsonl"
LOGGER = logging.getLogger("megatron_cca")


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
        self._handlers = (_EventFile(output_dir / FILE), _Terminal(self))

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


def read_events(output_dir: Path) -> list[dict]:
    """Return the events of a run in order, without an incomplete last line.

    Raises:
        UserError: a line that no run wrote. The message names it.
    """
    return [event for _, event in json_lines(output_dir / FILE, event=str)]
