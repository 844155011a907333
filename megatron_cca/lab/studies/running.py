"""The execution of a study's tasks: by workers of one process each, or by all ranks of the job together.

Collective over all ranks of the job. Rank 0 writes the files.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, fields, replace
from functools import cache
from pathlib import Path
from statistics import fmean

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

from megatron_cca import platform
from megatron_cca.data import DIGITS
from megatron_cca.data.digits import data_folders
from megatron_cca.generation import CandidateOptions, GenerateOptions, PromptOptions, RunOptions, SamplingOptions
from megatron_cca.generation.decode_loop import SamplingSettings, Scorer
from megatron_cca.generation.image_generator import open_image_generator
from megatron_cca.generation.model_loading import inspect_for_sampling
from megatron_cca.generation.prompts import Prompt, digit_prompts, prompts_named, seeded
from megatron_cca.generation.sampling_job import job_of
from megatron_cca.generation.shard_drawing import ShardDrawing
from megatron_cca.io.outputs import whole_file
from megatron_cca.lab.evaluation import FidelitySettings
from megatron_cca.lab.evaluation.checks import usable_moments
from megatron_cca.lab.evaluation.classifiers import class_accuracy, open_classifier
from megatron_cca.lab.evaluation.clip import open_scorer
from megatron_cca.lab.evaluation.extractors import open_extractor
from megatron_cca.lab.evaluation.fidelity import ReferenceImages, fidelity
from megatron_cca.lab.evaluation.image_sets import ImageSet, read_images
from megatron_cca.lab.evaluation.rewards import rewards_of
from megatron_cca.lab.evaluation.statistics import check_owner, check_statistics
from megatron_cca.lab.studies.schedule import Schedule, TaskFactory, expected_tasks, make_schedule
from megatron_cca.lab.studies.tasks import (
    FAILED,
    FINISHED,
    LOG,
    Drawing,
    EvaluationInputs,
    Outcome,
    Sampling,
    Task,
    Training,
    do,
    outcome_of,
    start,
    write_outcome,
)
from megatron_cca.parallel.ranks import initialize_distributed
from megatron_cca.training.batches import open_data
from megatron_cca.training.faults import Diverged
from megatron_cca.training.kernel_checks import check_devices
from megatron_cca.training.loop import train
from megatron_cca.training.run_log import read_metrics

_LAST_STEPS = 10
_LOGGED = ("loss", "positive_log_ratio", "negative_log_ratio", "accuracy")
IMAGES = "images.npz"
# Images that a model is trained on and images that it is judged by have random streams of their own.
_SEED_OF_DRAWING = 500_000
_SCORED_AT_ONCE = 64


def perform(task: Task) -> Outcome:
    """Do a task and write its result.

    The output of the task goes to a log in its folder.

    Returns:
        The contents of the result file. A training that ends in NaN or infinity has ``status`` failed and a ``reason``.

    Raises:
        UserError: anything that training, drawing or evaluation refuses; then there is no result.
    """
    # A thread reads ahead. With the default of 5 ms, this thread would wait as long for the interpreter each time.
    sys.setswitchinterval(1e-4)
    started = time.perf_counter()
    initialize_distributed(task.layout if isinstance(task, Sampling) else task.config)
    with _logged(task.folder):
        outcome = _DO[type(task)](task)
    outcome |= {"title": task.title, "seconds": round(time.perf_counter() - started, 2)}
    if dist.get_rank() == 0:
        write_outcome(task, outcome)
    return outcome


@contextlib.contextmanager
def _logged(folder: Path) -> Iterator[None]:
    if dist.get_rank() != 0:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (
        (folder / LOG).open("a", buffering=1) as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        yield


def _trained(task: Training) -> Outcome:
    check_devices(task.config)
    try:
        train(task.config, open_data(task.config))
    except Diverged as error:
        # All ranks raise it at the same step. They stay in step with each other.
        return _failed(f"diverged: {error.how}")
    if dist.get_rank() != 0:
        return {}
    rows = [row for row in read_metrics(task.folder) if row["loss"] is not None]
    last = rows[-_LAST_STEPS:]
    return {
        "status": FINISHED,
        **_means(last),
    }


def _means(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the mean of each metric over the rows that have it.

    A row lacks a metric that is undefined in its step.
    """
    found = {key: [row[key] for row in rows if row.get(key) is not None] for key in _LOGGED}
    return {f"last_{key}": fmean(values) for key, values in found.items() if values}


def _failed(reason: str) -> Outcome:
    return {"status": FAILED, "reason": reason}


def _drawn(task: Drawing) -> Outcome:
    (like,) = data_folders(task.config)
    # It is complete if it exists. A killed study may have left it without a result.
    if not task.shards.exists():
        job = job_of(_drawing_options(task, like), checkpoint := inspect_for_sampling(task.checkpoint))
        drawing = ShardDrawing(job, checkpoint)
        drawing.run(open_image_generator(checkpoint, before_loading=drawing.prepare))
    return {"status": FINISHED} if dist.get_rank() == 0 else {}


def _drawing_options(task: Drawing, like: Path) -> GenerateOptions:
    settings = asdict(task.drawing)
    names = [one.name for one in fields(SamplingOptions) if one.name in settings]
    return GenerateOptions(
        checkpoint=task.checkpoint,
        shards=task.shards,
        prompting=PromptOptions(like=like, seed=_SEED_OF_DRAWING + task.seed),
        candidates=CandidateOptions(sampling=SamplingOptions(**{name: settings[name] for name in names})),
        run=RunOptions(batch_size=task.drawing.batch_size),
    )


def _sampled(task: Sampling) -> Outcome:
    prompts = _prompts(task.evaluation.prompts, task.count, task.seed)
    images = draw(task, prompts)
    if dist.get_rank() != 0:
        return {}
    if task.keep_images:
        _keep(task.folder / IMAGES, images, prompts)
    found = evaluated(task.evaluation, images, prompts)
    bad = [name for name, value in found.items() if not math.isfinite(value)]
    return _failed(f"{bad[0]} is {found[bad[0]]}") if bad else {"status": FINISHED, **found}


def _prompts(name: str, count: int, seed: int) -> list[Prompt]:
    if name == DIGITS:
        return digit_prompts(count, seed)
    listed = prompts_named(name)
    # With seeds of their own, the prompts would make all seeds of a study equal.
    return seeded([replace(listed[index % len(listed)], seed=None) for index in range(count)], seed)


def draw(task: Sampling, prompts: Sequence[Prompt]) -> np.ndarray:
    """Draw images from a model, uint8 ``[N, H, W, 3]``. Collective over all ranks."""
    generator = open_image_generator(task.checkpoint)
    settings = SamplingSettings(**asdict(task.sampling))
    with tqdm(total=len(prompts), unit="image", desc="drawing", mininterval=10, disable=dist.get_rank() != 0) as bar:
        return generator.generate(prompts, settings, on_progress=bar.update).images


def _keep(path: Path, images: np.ndarray, prompts: Sequence[Prompt]) -> None:
    arrays = {"arr_0": images}
    labels = [prompt.label for prompt in prompts]
    if None not in labels:
        arrays["arr_1"] = np.array(labels, dtype=np.int64)
    with whole_file(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **arrays)


def evaluated(inputs: EvaluationInputs, images: np.ndarray, prompts: Sequence[Prompt]) -> dict[str, float]:
    """Return the requested metrics, ``accuracy`` if there is a classifier, and ``reward`` if there is a scorer.

    Args:
        inputs: the classifier, the scorer, the extractor, the reference and the metrics.
        images: uint8 ``[N, H, W, 3]``.
        prompts: as many prompts, with labels if there is a classifier.
    """
    found = {}
    if inputs.classifier is not None:
        labels = np.array([prompt.label for prompt in prompts], dtype=np.int64)
        found["accuracy"] = class_accuracy(images, labels, open_classifier(inputs.classifier)).overall
    if inputs.scorer is not None:
        drawn = ImageSet(images, prompts=[prompt.title for prompt in prompts])
        rewards = rewards_of("drawn", drawn, {inputs.scorer: _scorer(inputs.scorer)}, _SCORED_AT_ONCE)
        found["reward"] = rewards[inputs.scorer].mean
    reference = _reference(inputs.reference, inputs.extractor, inputs.inception_weights)
    settings = FidelitySettings(metrics=inputs.metrics, inception_score_splits=inputs.inception_score_splits)
    return found | fidelity(images, reference, reference.extractor, settings)


@cache
def _reference(reference: str, extractor: str, weights: str | None) -> ReferenceImages:
    network = open_extractor(extractor, weights and Path(weights)).to(platform.device())
    images = read_images(reference)
    for notice in images.notices:
        print(f"reference {reference}: {notice}", file=sys.stderr)
    check_owner(images, reference, extractor)
    check_statistics(images, reference, extractor, network.origin, ())
    return ReferenceImages(images.images, network, usable_moments(extractor, images))


@cache
def _scorer(spec: str) -> Scorer:
    return open_scorer(spec, platform.device())


_DO = {Training: _trained, Drawing: _drawn, Sampling: _sampled}


class TaskQueue:
    """The outcomes of a study's tasks, and the tasks that can start next."""

    def __init__(self, factory: TaskFactory) -> None:
        self.factory = factory
        self._known: dict[Path, Outcome] = {}

    def outcome(self, task: Task) -> Outcome | None:
        """Return a task's outcome; None before the task has ended."""
        if task.folder not in self._known:
            outcome = outcome_of(task)
            if outcome is None:
                return None
            self._known[task.folder] = outcome
        return self._known[task.folder]

    @property
    def schedule(self) -> Schedule:
        """The schedule with all tasks that are known by now."""
        return make_schedule(self.factory, self.outcome)

    def ready(self, running: Collection[Path] = ()) -> list[Task]:
        """Return the tasks that can start, in the order of the schedule.

        ``running`` has the folders of the tasks that run already.
        """
        return [
            task
            for task in self.schedule.tasks
            if task.folder not in running
            and self.outcome(task) is None
            and (task.after is None or self.outcome(task.after) is not None)
        ]


class TaskBar:
    """A bar over tasks on a terminal; otherwise one line for each task that has ended."""

    def __init__(self, queue: TaskQueue, *, is_shown: bool = True) -> None:
        self.queue, self.is_shown = queue, is_shown
        self.expected = expected_tasks(queue.factory)
        self.bar = tqdm(
            total=self.expected,
            initial=self._count()[0],
            unit="task",
            desc=queue.factory.study.settings.name,
            disable=None if is_shown else True,
            dynamic_ncols=True,
        )

    def _count(self) -> tuple[int, int]:
        tasks = self.queue.schedule.tasks
        return sum(self.queue.outcome(task) is not None for task in tasks), len(tasks)

    def ended(self, task: Task, outcome: Outcome) -> None:
        """Count a task that has ended."""
        self.bar.n, known = self._count()
        self.bar.total = max(self.expected, known)
        self.bar.set_postfix_str(task.title, refresh=False)
        self.bar.refresh()
        has_failed = outcome["status"] == FAILED
        if self.is_shown and (self.bar.disable or has_failed):
            how = f"failed, {outcome['reason']}" if has_failed else f"{outcome['seconds']:.1f} s"
            self.bar.write(f"{self.bar.n}/{self.bar.total} {task.title}: {how}", file=sys.stdout)
            sys.stdout.flush()


def run_in_pool(queue: TaskQueue, workers: int) -> None:
    """Do all tasks with ``workers`` processes.

    Each process takes a ready task, on one device with one thread, until none is left.

    Raises:
        UserError: anything that a task refuses; finished tasks keep their results.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    options = {
        "mp_context": context,
        "initializer": start,
        "initargs": (platform.current().device_type, context.Value("i")),
    }
    pool = ProcessPoolExecutor(workers, **options)
    progress, running = TaskBar(queue), {}
    try:
        while True:
            folders = {task.folder for task in running.values()}
            for task in queue.ready(folders)[: workers - len(running)]:
                running[pool.submit(do, task)] = task
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                progress.ended(running.pop(future), future.result())
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    finally:
        progress.bar.close()
    pool.shutdown()


def run_together(queue: TaskQueue) -> None:
    """Do all tasks one after another, each with all ranks of the job.

    Raises:
        UserError: anything that a task refuses; finished tasks keep their results.
    """
    initialize_distributed(queue.factory.layout)
    is_first = dist.get_rank() == 0
    progress = TaskBar(queue, is_shown=is_first)
    try:
        while (task := _agreed(queue.ready()[:1] if is_first else [])) is not None:
            outcome = do(task)
            if is_first:
                progress.ended(task, outcome)
    finally:
        progress.bar.close()
    dist.destroy_process_group()


def _agreed(ready: list[Task]) -> Task | None:
    """Return on each rank the task that rank 0 takes next."""
    choice = [ready[0] if ready else None]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(choice, src=0, device=platform.device())
    return choice[0]
