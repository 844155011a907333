"""What a study consists of: training runs, and sets of samples that are drawn and judged; each has a folder.

Also the processes that do them side by side. Nothing here imports Megatron-Core before the platform is installed.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

from megatron_cca import __version__, platform
from megatron_cca.config import Config
from megatron_cca.errors import UserError
from megatron_cca.io.external_files import json_object
from megatron_cca.io.outputs import write_json
from megatron_cca.lab.studies.settings import SamplingConfig


def digest(contents: Mapping[str, Any]) -> str:
    """Of plain data and this package's version, 12 hexadecimal digits."""
    text = json.dumps({"version": __version__, **contents}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


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


def start(device: platform.DeviceChoice, started: Synchronized) -> None:
    """Prepare a worker: its own device of several, and no life without the program that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()
    with started.get_lock():
        os.environ["LOCAL_RANK"] = str(started.value)
        started.value += 1
    platform.install(device)


def _leave_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    # Megatron-Core's saving leaves one that would stay behind.
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(1)


def do(task: Task) -> Outcome:
    """See :func:`megatron_cca.lab.studies.work.perform`."""
    # Imported late: Megatron-Core must not be imported before the platform is installed.
    from megatron_cca.lab.studies.work import perform

    return perform(task)
