"""What a study consists of: training runs, and sets of samples that are drawn and judged; each has a folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_cca.config import Config
from megatron_cca.errors import UserError
from megatron_cca.io.external_files import json_object
from megatron_cca.io.outputs import write_json
from megatron_cca.lab.studies.settings import SamplingConfig

RESULT = "result.json"
LOG = "log.txt"
FINISHED, FAILED = "finished", "failed"

Outcome = dict[str, Any]


@dataclass(frozen=True)
class Training:
    """A training run.

    Attributes:
        title: for people.
        folder: its ``training.output_dir``.
        config: ready to be run.
        after: the run that makes its base; None where that is there already.
    """

    title: str = field(compare=False)
    folder: Path
    config: Config = field(hash=False)
    after: Training | None = None


@dataclass(frozen=True)
class Judging:
    """What samples are asked for and held against; see :class:`StudySettings`."""

    prompts: str
    reference: str
    extractor: str
    inception_weights: str | None
    classifier: str | None
    metrics: tuple[str, ...]
    inception_score_splits: int


@dataclass(frozen=True)
class Sampling:
    """A set of samples of one model.

    Attributes:
        title: for people.
        folder: for its judgement and images.
        checkpoint: of the model.
        after: the run that makes it; None where it is there already.
        layout: a configuration of the layout to draw on.
        count: how many.
        seed: of prompts and random streams.
    """

    title: str = field(compare=False)
    folder: Path
    checkpoint: str
    after: Training | None
    layout: Config = field(hash=False)
    sampling: SamplingConfig
    judging: Judging
    count: int
    seed: int
    keep_images: bool = field(compare=False)


Task = Training | Sampling


def outcome_of(task: Task) -> Outcome | None:
    """How a task ended: its result file's contents, with ``status`` and, of a failed one, ``reason``; None before that.

    Samples of a model whose training failed have failed with it.

    Raises:
        UserError: a damaged result file; names it.
    """
    if task.after is not None:
        before = outcome_of(task.after)
        if before is not None and before["status"] == FAILED:
            return before if isinstance(task, Sampling) else {**before, "reason": f"its base: {before['reason']}"}
    path = task.folder / RESULT
    if not path.is_file():
        return None
    outcome = json_object(path)
    if outcome.get("status") not in (FINISHED, FAILED):
        raise UserError(f"{path} is damaged: it has no status; delete it to do the task again")
    return outcome


def write_outcome(task: Task, outcome: Mapping[str, Any]) -> None:
    """Leave a task's result in its folder; it is whole or not there."""
    write_json(task.folder / RESULT, outcome)
