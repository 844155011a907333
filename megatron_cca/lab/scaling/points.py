"""The records of a sweep: one JSON file for each point, named after its task's key, and ``results.jsonl`` with all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cca.errors import UserError, one_line, shortened
from megatron_cca.io.external_files import json_object
from megatron_cca.io.outputs import write_json, write_text
from megatron_cca.lab.scaling.sweep import Task
from megatron_cca.lab.studies.tasks import FAILED, FINISHED

RESULTS, TABLE, PLOT = "results.jsonl", "table.md", "scaling.png"
FOLDER, LOGS = "points", "logs"
_REASON_LENGTH = 300
_NUMBERS = ("tokens_per_second_per_gpu", "low", "high", "mfu", "memory_gib", "communication", "bubble", "ideal_bubble")

Record = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A task and its record."""

    task: Task
    record: Record

    @property
    def is_finished(self) -> bool:
        """Whether the record has numbers."""
        return self.record["status"] == FINISHED


def record_path(output: Path, task: Task) -> Path:
    """Return the path of a task's record."""
    return output / FOLDER / f"{task.key}.json"


def read_record(output: Path, task: Task) -> Record | None:
    """Read a task's record; return None before the task has ended.

    Raises:
        UserError: the file is damaged; names it.
    """
    path = record_path(output, task)
    if not path.is_file():
        return None
    record = json_object(path)
    is_whole = record.get("status") == FINISHED and all(type(record.get(one)) in (int, float) for one in _NUMBERS)
    is_told = record.get("status") == FAILED and isinstance(record.get("reason"), str)
    if not (is_whole or is_told):
        raise UserError(f"{path} is damaged: it holds no point of a sweep; delete it to run the point again")
    return record


def write_finished(output: Path, task: Task, found: Record) -> None:
    """Write the result of a point.

    The file is complete or does not exist.
    """
    _write(output, task, {"status": FINISHED, **found})


def write_failed(output: Path, task: Task, reason: str) -> None:
    """Write why a point has no numbers.

    An existing record stays.
    """
    if not record_path(output, task).exists():
        _write(
            output, task, {"status": FAILED, "reason": shortened(one_line(" ".join(reason.split())), _REASON_LENGTH)}
        )


def _write(output: Path, task: Task, record: Record) -> None:
    write_json(record_path(output, task), {"key": task.key, "kind": task.kind, "num_gpus": task.num_gpus, **record})


def forget_failed(output: Path, tasks: Sequence[Task]) -> None:
    """Delete the records of failed points, so that these run again."""
    for task in tasks:
        record = read_record(output, task)
        if record is not None and record["status"] == FAILED:
            record_path(output, task).unlink()


def rows_of(output: Path, tasks: Sequence[Task]) -> list[Row]:
    """Return the tasks that have ended, in order."""
    found = [(task, read_record(output, task)) for task in tasks]
    return [Row(task, record) for task, record in found if record is not None]


def write_results(output: Path, rows: Sequence[Row]) -> None:
    """Write ``results.jsonl``, one object for each point.

    The file is complete or unchanged.
    """
    lines = [
        json.dumps({"point": row.task.title, "mode": row.task.mode, "series": row.task.series, **row.record})
        for row in rows
    ]
    write_text(output / RESULTS, "".join(f"{line}\n" for line in lines))
