"""The schedule of a study: which runs and samples its settings ask for, and which of them are the same.

The layout of the ranks is not among them. It changes only rounding.

The tuning seed alone chooses the settings. Nothing reads a result of a reported seed before the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_cca.checkpoint import layout
from megatron_cca.config import Config
from megatron_cca.config.former import OBJECTIVE_KEYS
from megatron_cca.config.load import config_to_dict, load_config
from megatron_cca.data import DIGITS
from megatron_cca.data.manifest import fingerprint, read_manifest
from megatron_cca.keys import effects
from megatron_cca.lab.studies import DRAWING, SAMPLING, Keys
from megatron_cca.lab.studies.study import BASE, ConfiguredRun, Method, Study
from megatron_cca.lab.studies.tasks import (
    FINISHED,
    Drawing,
    EvaluationInputs,
    Outcome,
    Sampling,
    Task,
    Training,
    digest,
)
from megatron_cca.models import explicit, resolve_architecture
from megatron_cca.models.architecture import ATTENTION_OPTIONS

DRAWN, TRAINED, SAMPLED = "drawn", "trained", "sampled"
Outcomes = Callable[[Task], Outcome | None]


def training_contents(config: Config, base: str | None) -> dict[str, Any]:
    """Return all inputs of a training run as plain data.

    Args:
        config: configuration of the run, seed included.
        base: the key of the base; None for random weights.

    Raises:
        UserError: the configuration names a folder without token shards.
    """
    tree = config_to_dict(explicit(config))
    # A former version's studies must continue with the same keys.
    tree["objective"] = OBJECTIVE_KEYS | tree["objective"]
    for name in set(ATTENTION_OPTIONS) - set(resolve_architecture(config.model).attention_options):
        del tree["model"][name]
    for key, effect in effects(config).items():
        section, _, name = key.partition(".")
        if not effect.study:
            del tree[section][name]
    tree = {section: keys for section, keys in tree.items() if keys}
    paths = [config.data.path, config.validation.path]
    names = [name for path in paths if path is not None for name in ([path] if isinstance(path, str) else path)]
    return {"config": tree, "base": base, "data": [_data_key(name) for name in names]}


def _data_key(name: str) -> str:
    # The shards of the digits are created at first use. They are always the same.
    return name if name == DIGITS else fingerprint(read_manifest(Path(name)))


def checkpoint_key(checkpoint: str, option: str) -> str:
    """Return the key of a checkpoint from outside the study.

    It covers the checkpoint's folder and its summary.

    Raises:
        UserError: the folder has no complete checkpoint.
    """
    folder = layout.resolve(checkpoint, option)
    return digest({"folder": str(folder.resolve()), "summary": layout.read_summary(folder, option)})


def file_stamp(name: str | Path) -> list[Any]:
    """Return a name with the size and the time of its file or folder, which show a change.

    Of FILE.py:FUNCTION and of KIND:FILE it is the file. The time of a folder changes with the names in it. Without a
    file or folder it is the name alone.
    """
    file, _, function = str(name).rpartition(":")
    path = Path(file if function and file.endswith(".py") else name)
    if not path.exists():
        path = Path(str(name).partition(":")[2])
    if not path.name or not path.exists():
        return [str(name)]
    status = path.stat()
    return [str(name), str(path.resolve()), status.st_size if path.is_file() else None, status.st_mtime_ns]


@dataclass(frozen=True)
class TableRow:
    """One row of the results: a method with its settings, and its samples on each seed.

    Attributes:
        values: the tuned and the swept keys.
        is_chosen: whether tuning chose these settings; otherwise they belong to the sweep.
    """

    method: Method
    values: Keys
    is_chosen: bool
    samplings: list[Sampling]

    @property
    def run(self) -> ConfiguredRun:
        """The run of the settings."""
        return self.method.configured(self.values)


class TaskFactory:
    """The maker of a study's tasks.

    Args:
        study: a study that :func:`check_study` accepted.
        output: the folder that studies share.
    """

    def __init__(self, study: Study, output: Path) -> None:
        self.study, self.output = study, output
        settings = study.settings
        self.evaluation = EvaluationInputs(
            prompts=settings.prompts,
            reference=settings.reference,
            extractor=settings.extractor,
            inception_weights=settings.inception_weights,
            classifier=settings.classifier,
            scorer=settings.scorer,
            metrics=tuple(settings.metrics),
            inception_score_splits=settings.inception_score_splits,
        )
        self._stamps = [file_stamp(name) for name in asdict(self.evaluation).values() if isinstance(name, str)]
        given = settings.base.checkpoint
        self._given_key = None if given is None else checkpoint_key(given, "base.checkpoint")
        self.layout = study.base or _layout_of(study)
        # Each task that ends makes a new schedule. The keys take some time to compute.
        self._trials: dict[str, list[tuple[Keys, Sampling]]] = {}
        self._rows: dict[tuple[str, str], list[TableRow]] = {}

    def trials(self, method: Method) -> list[tuple[Keys, Sampling]]:
        """Return the settings to try for a method, each with the samples that judge them."""
        if method.name not in self._trials:
            settings = self.study.settings
            count = settings.tuning_samples or settings.samples
            self._trials[method.name] = [
                (values, self.sampling(method, values, settings.tuning_seed, count)) for values in method.trials
            ]
        return self._trials[method.name]

    def rows(self, method: Method, chosen: Keys) -> list[TableRow]:
        """Return the reported rows of a method: the chosen settings, then the sweep around them."""
        key = method.name, repr(chosen)
        if key not in self._rows:
            rows = [(chosen, True), *(({**chosen, **swept}, False) for swept in method.sweep)]
            self._rows[key] = [
                TableRow(method, values, is_it, self._samplings(method, values)) for values, is_it in rows
            ]
        return self._rows[key]

    def _samplings(self, method: Method, values: Keys) -> list[Sampling]:
        settings = self.study.settings
        return [self.sampling(method, values, seed, settings.samples) for seed in settings.seeds]

    def sampling(self, method: Method, values: Keys, seed: int, count: int) -> Sampling:
        """Return the task that samples a method with settings on one seed."""
        configured = method.configured(values)
        run = self.training(method, values, seed)
        # Names of former versions, whose finished samples are found by these keys.
        contents = {
            "model": self._key(run),
            "sampling": asdict(configured.sampling) | {"batch_size": None},
            # Results of studies from before there were scorers keep their folders.
            "judging": {name: one for name, one in asdict(self.evaluation).items() if (name, one) != ("scorer", None)},
            "marks": self._stamps,
            "count": count,
            "seed": seed,
        }
        return Sampling(
            title=f"draw {_title(method, values)}, seed {seed}",
            folder=self.output / SAMPLED / f"{_kind(configured.config)}-{digest(contents)}",
            checkpoint=self._path(run),
            after=run,
            layout=self.layout,
            sampling=configured.sampling,
            evaluation=self.evaluation,
            count=count,
            seed=seed,
            keep_images=self.study.settings.keep_images,
        )

    def training(self, method: Method, values: Keys, seed: int) -> Training | None:
        """Return the training run of a model, the last one if there are several rounds.

        It is None for the given checkpoint.
        """
        configured, newest = method.configured(values), self._base(seed)
        config, drawing = configured.config, configured.drawing
        if config is None:
            return newest
        trained = {key: value for key, value in values.items() if not key.startswith(SAMPLING)}
        title = f"train {_title(method, trained)}, seed {seed}"
        if drawing is None:
            return self._run(title, config, seed, newest)
        drawn = {key: value for key, value in trained.items() if key.startswith(DRAWING)}
        for number in range(1, drawing.rounds + 1):
            one = f", round {number}" if drawing.rounds > 1 else ""
            to_draw = f"draw {_title(method, drawn)} to train on, seed {seed}{one}"
            newest = self._run(title + one, config, seed, newest, self._drawing(to_draw, configured, seed, newest))
        return newest

    def _base(self, seed: int) -> Training | None:
        if self.study.base is None:
            return None
        own = replace(self.study.base.training, seed=seed, pretrained_checkpoint=None)
        config = replace(self.study.base, training=own)
        key = digest(training_contents(config, None))
        return _training(f"pretrain the base, seed {seed}", self.output / TRAINED / f"base-{key}", config, None)

    def _run(
        self, title: str, config: Config, seed: int, start: Training | None, drawing: Drawing | None = None
    ) -> Training:
        """Return the run that goes on from ``start``, or from the given checkpoint if that is None."""
        config = replace(config, training=replace(config.training, seed=seed, pretrained_checkpoint=self._path(start)))
        contents = training_contents(config, self._key(start))
        if drawing is not None:
            contents["drawn"] = [drawing.folder.name, drawing.drawing.role]
            key = "path" if drawing.drawing.role == "data" else "partner_path"
            config = replace(config, data=replace(config.data, **{key: str(drawing.shards)}))
        folder = self.output / TRAINED / f"{config.objective.name}-{digest(contents)}"
        return _training(title, folder, config, start if drawing is None else drawing)

    def _drawing(self, title: str, run: ConfiguredRun, seed: int, newest: Training | None) -> Drawing:
        # Methods that use the same images in another way share them.
        usage = {"role": None, "rounds": None, "batch_size": None}
        contents = {
            "model": self._key(newest),
            "like": _data_key(run.config.data.path),
            "drawing": asdict(run.drawing) | usage,
            "seed": seed,
        }
        folder = self.output / DRAWN / digest(contents)
        return Drawing(title, folder, self._path(newest), newest, run.config, run.drawing, seed)

    def _key(self, model: Training | None) -> str | None:
        return self._given_key if model is None else model.folder.name

    def _path(self, model: Training | None) -> str | None:
        return self.study.settings.base.checkpoint if model is None else str(model.folder)


@dataclass(frozen=True)
class Schedule:
    """The known tasks of a study.

    Attributes:
        trials: the trials of each tuned method.
        chosen: for each method with finished trials, the best settings, or None if all trials failed.
        rows: the rows of each method with chosen settings.
    """

    trials: dict[str, list[tuple[Keys, Sampling]]]
    chosen: dict[str, Keys | None]
    rows: list[TableRow]

    @property
    def tasks(self) -> list[Task]:
        """All tasks, each one once and after the task that it needs."""
        samplings = [sampling for trials in self.trials.values() for _, sampling in trials]
        samplings += [sampling for row in self.rows for sampling in row.samplings]
        found: dict[Path, Task] = {}
        for sampling in samplings:
            for task in (*_before(sampling), sampling):
                found.setdefault(task.folder, task)
        return list(found.values())


def make_schedule(factory: TaskFactory, outcomes: Outcomes) -> Schedule:
    """Return the schedule that follows from the outcomes of tasks.

    Args:
        factory: makes the tasks of the study.
        outcomes: returns a task's result, or None if there is none; called for trials only.
    """
    study = factory.study
    trials = {method.name: factory.trials(method) for method in study.tuned}
    chosen: dict[str, Keys | None] = {BASE: {}}
    for name, tried in trials.items():
        results = [(values, outcomes(sampling)) for values, sampling in tried]
        if all(result is not None for _, result in results):
            chosen[name] = best(results, study.settings.tune_by)
    rows = [
        row
        for name, values in chosen.items()
        if values is not None
        for row in factory.rows(study.methods[name], values)
    ]
    return Schedule(trials, chosen, rows)


def best(results: list[tuple[Keys, Outcome]], metric: str) -> Keys | None:
    """Return the settings with the lowest FID, or with the highest value of another metric.

    Of equal ones it is the first.

    Returns:
        The settings; None if no trial finished.
    """
    finished = [(values, outcome[metric]) for values, outcome in results if outcome["status"] == FINISHED]
    if not finished:
        return None
    sign = 1 if metric == "fid" else -1
    return min(finished, key=lambda one: sign * one[1])[0]


def expected_tasks(factory: TaskFactory) -> int:
    """Estimate the number of tasks of the study before the settings are chosen."""
    first = {method.name: method.trials[0] for method in factory.study.methods.values()}
    rows = [row for name, values in first.items() for row in factory.rows(factory.study.methods[name], values)]
    return len(Schedule({method.name: factory.trials(method) for method in factory.study.tuned}, {}, rows).tasks)


def _training(title: str, folder: Path, config: Config, after: Training | Drawing | None) -> Training:
    training, logging = replace(config.training, output_dir=str(folder)), replace(config.logging, progress_bar=False)
    return Training(title, folder, replace(config, training=training, logging=logging), after)


def _before(task: Task) -> Iterator[Task]:
    if task.after is not None:
        yield from _before(task.after)
        yield task.after


def _layout_of(study: Study) -> Config:
    return next((method.config for method in study.tuned if method.config is not None), load_config())


def _kind(config: Config | None) -> str:
    return BASE if config is None else config.objective.name


def _title(method: Method, values: Keys) -> str:
    return " ".join([method.label, *(f"{key.rpartition('.')[2]}={value}" for key, value in values.items())])
