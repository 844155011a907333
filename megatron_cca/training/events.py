"""The events of a run, one JSON object a line in ``events.jsonl``, and where a rank reports them."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from megatron_cca.io.external_files import json_lines
from megatron_cca.training.metrics import MetricsLog

FILE = "events.jsonl"


class EventLog:
    """The file ``<output_dir>/events.jsonl``. Every rank may append a line to it. A full disk does not stop the run.

    Args:
        output_dir: the run's folder.
    """

    def __init__(self, output_dir: Path) -> None:
        self._path = output_dir / FILE
        self._complained = False

    def write(self, event: str, **details: object) -> None:
        """Append one event.

        Args:
            event: started, resumed, passed_over, forks, nothing_to_contrast, little_to_contrast, saved, save_failed,
                removed, skipped_step, alarm, logs_lost, output_lost, stopped, hang, failed or finished.
            details: further entries, which JSON can hold.
        """
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "event": event,
            "rank": int(os.environ.get("RANK", "0")),
            # The number of restarts by torchrun itself.
            "restart": int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
            **details,
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


@dataclass(frozen=True)
class Journal:
    """The place where a rank reports. Rank 0 prints and writes files. Other ranks write only their own events.

    Attributes:
        log: the metrics log on rank 0, None elsewhere.
        events: the event log, on every rank.
    """

    log: MetricsLog | None
    events: EventLog

    def say(self, line: str) -> None:
        """Print a line, on rank 0."""
        if self.log is not None:
            self.log.say(line)

    def log_row(self, row: dict[str, float]) -> None:
        """Log the metrics of a step, on rank 0."""
        if self.log is not None:
            self.log.write(row)

    def note(self, event: str, **details: object) -> None:
        """Write an event that all ranks know of to ``events.jsonl``, on rank 0."""
        if self.log is not None:
            self.events.write(event, **details)

    def tell(self, event: str, line: str, **details: object) -> None:
        """Print a line and write its event, on rank 0."""
        self.say(line)
        self.note(event, **details)


def read_events(output_dir: Path) -> list[dict]:
    """Return the events of a run in order, without an incomplete last line.

    Raises:
        UserError: a line that no run wrote. The message names it.
    """
    return [event for _, event in json_lines(output_dir / FILE, event=str)]
