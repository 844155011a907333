"""The tasks of a study: images to draw and train on, training runs, and samples to draw and evaluate.

Each task has a folder.

The module also starts the processes that do tasks in parallel. Nothing here imports Megatron-Core before the platform
is installed.
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
from megatron_cca.io.file_contents import json_object
from megatron_cca.io.outputs import write_json
from megatron_cca.lab.studies import DrawingConfig, SamplingConfig

RESULT = "result.json"
LOG = "log.txt"
FINISHED, FAILED = "finished", "failed"
Outcome = dict[str, Any]


def digest(contents: Mapping[str, Any]) -> str:
    """Return a hash of plain data and this package's version, 12 hexadecimal digits."""
    text = json.dumps({"version": __version__, **contents}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Training:
    """A training run.

    Attributes:
        title: its name in messages.
        folder: its ``training.output_dir``.
        config: the complete configuration.
        after: the task that draws its data, else the run that trains its base; None if all that exists already.
    """

    title: str = field(compare=False)
    folder: Path
    config: Config = field(hash=False)
    after: Training | Drawing | None = None


@dataclass(frozen=True)
class Drawing:
    """Images that a model draws to be trained on, one for each sample of a shard folder.

    Attributes:
        title: its name in messages.
        folder: folder of the result and of :attr:`shards`.
        checkpoint: checkpoint of the model.
        after: the run that trains the model; None if its checkpoint exists already.
        config: a configuration with the layout for drawing. Its ``data.path`` is the folder of the samples.
        seed: seed of the random streams.
    """

    title: str = field(compare=False)
    folder: Path
    checkpoint: str
    after: Training | None
    config: Config = field(compare=False)
    drawing: DrawingConfig = field(compare=False)
    seed: int

    @property
    def shards(self) -> Path:
        """The shard folder of the images."""
        return self.folder / "shards"


@dataclass(frozen=True)
class EvaluationInputs:
    """The prompts of samples, and what they are evaluated with; see :class:`StudySettings`."""

    prompts: str
    reference: str
    extractor: str
    inception_weights: str | None
    classifier: str | None
    scorer: str | None
    metrics: tuple[str, ...]
    inception_score_splits: int


@dataclass(frozen=True)
class Sampling:
    """Samples of one model.

    Attributes:
        title: its name in messages.
        folder: folder of the result and the images.
        checkpoint: checkpoint of the model.
        after: the run that trains the model; None if its checkpoint exists already.
        layout: a configuration with the parallel layout for drawing.
        count: number of samples.
        seed: seed of the prompts and of the random streams.
    """

    title: str = field(compare=False)
    folder: Path
    checkpoint: str
    after: Training | None
    layout: Config = field(hash=False)
    sampling: SamplingConfig
    evaluation: EvaluationInputs
    count: int
    seed: int
    keep_images: bool = field(compare=False)


Task = Training | Drawing | Sampling


def outcome_of(task: Task) -> Outcome | None:
    """Return a task's outcome; None before the task has ended.

    It is the contents of the result file: ``status`` and, for a failed task, ``reason``. If the training of a model
    failed, what it should draw failed too.

    Raises:
        UserError: the result file is damaged; names it.
    """
    if task.after is not None:
        before = outcome_of(task.after)
        if before is not None and before["status"] == FAILED:
            is_its_base = isinstance(task, Training) and isinstance(task.after, Training)
            return {**before, "reason": f"its base: {before['reason']}"} if is_its_base else before
    path = task.folder / RESULT
    if not path.is_file():
        return None
    outcome = json_object(path)
    if outcome.get("status") not in (FINISHED, FAILED):
        raise UserError(f"{path} is damaged: it has no status; delete it to do the task again")
    return outcome


def write_outcome(task: Task, outcome: Mapping[str, Any]) -> None:
    """Write a task's result to its folder.

    The file is complete or does not exist.
    """
    write_json(task.folder / RESULT, outcome)


def start(device: platform.DeviceChoice, started: Synchronized) -> None:
    """Prepare a worker: give it its own device, and end it with the program that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()
    with started.get_lock():
        os.environ["LOCAL_RANK"] = str(started.value)
        started.value += 1
    platform.install(device)


def _leave_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    # Megatron-Core's asynchronous saving starts a process that would stay behind.
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(1)


def do(task: Task) -> Outcome:
    """Do a task with :func:`megatron_cca.lab.studies.running.perform`."""
    # Imported late: Megatron-Core must not be imported before the platform is installed.
    from megatron_cca.lab.studies.running import perform

    return perform(task)
