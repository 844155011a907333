"""From a study and what is known so far to its tasks: trials first, then what is reported at the chosen settings.

Settings are chosen on the tuning seed alone; no result of a reported seed is looked at before the table is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_cca.config import Config
from megatron_cca.config.load import load_config
from megatron_cca.lab.studies.keys import checkpoint_key, digest, mark, training_contents
from megatron_cca.lab.studies.settings import SAMPLING, Keys
from megatron_cca.lab.studies.study import BASE, Method, Point, Study
from megatron_cca.lab.studies.tasks import FINISHED, Judging, Outcome, Sampling, Task, Training

TRAINED, SAMPLED = "trained", "sampled"
Outcomes = Callable[[Task], Outcome | None]


@dataclass(frozen=True)
class Row:
    """One line of the results: a method at settings, with its samples on each seed.

    Attributes:
        values: the tuned and the swept keys.
        is_chosen: whether these are what tuning chose; otherwise it is a value of the sweep.
    """

    method: Method
    values: Keys
    is_chosen: bool
    samplings: list[Sampling]

    @property
    def point(self) -> Point:
        """What the settings mean."""
        return self.method.point(self.values)


class Planner:
    """Makes a study's tasks.

    Args:
        study: what :func:`check_study` has let pass.
        output: the folder that studies share.
    """

    def __init__(self, study: Study, output: Path) -> None:
        self.study, self.output = study, output
        settings = study.settings
        self.judging = Judging(
            prompts=settings.prompts,
            reference=settings.reference,
            extractor=settings.extractor,
            inception_weights=settings.inception_weights,
            classifier=settings.classifier,
            metrics=tuple(settings.metrics),
            inception_score_splits=settings.inception_score_splits,
        )
        self._marks = [mark(name) for name in asdict(self.judging).values() if isinstance(name, str)]
        given = settings.base.checkpoint
        self._given_key = None if given is None else checkpoint_key(given, "base.checkpoint")
        self.layout = study.base or _layout_of(study)
        # A plan is made whenever a task has ended; keys take a while.
        self._trials: dict[str, list[tuple[Keys, Sampling]]] = {}
        self._rows: dict[tuple[str, str], list[Row]] = {}

    def trials(self, method: Method) -> list[tuple[Keys, Sampling]]:
        """The settings that are tried for a method, and the samples that they are judged by."""
        if method.name not in self._trials:
            settings = self.study.settings
            count = settings.tuning_samples or settings.samples
            self._trials[method.name] = [
                (values, self.sampling(method, values, settings.tuning_seed, count)) for values in method.trials
            ]
        return self._trials[method.name]

    def rows(self, method: Method, chosen: Keys) -> list[Row]:
        """What is reported of a method: the chosen settings, then the sweep around them."""
        key = method.name, repr(chosen)
        if key not in self._rows:
            rows = [(chosen, True), *(({**chosen, **swept}, False) for swept in method.sweep)]
            self._rows[key] = [Row(method, values, is_it, self._samplings(method, values)) for values, is_it in rows]
        return self._rows[key]

    def _samplings(self, method: Method, values: Keys) -> list[Sampling]:
        settings = self.study.settings
        return [self.sampling(method, values, seed, settings.samples) for seed in settings.seeds]

    def sampling(self, method: Method, values: Keys, seed: int, count: int) -> Sampling:
        """Samples of a method at settings, on one seed."""
        point = method.point(values)
        run = self.training(method, values, point.config, seed)
        key = self._given_key if run is None else run.folder.name
        contents = {
            "model": key,
            "sampling": asdict(point.sampling) | {"batch_size": None},
            "judging": asdict(self.judging),
            "marks": self._marks,
            "count": count,
            "seed": seed,
        }
        return Sampling(
            title=f"draw {_title(method, values)}, seed {seed}",
            folder=self.output / SAMPLED / f"{_kind(point.config)}-{digest(contents)}",
            checkpoint=self.study.settings.base.checkpoint if run is None else str(run.folder),
            after=run,
            layout=self.layout,
            sampling=point.sampling,
            judging=self.judging,
            count=count,
            seed=seed,
            keep_images=self.study.settings.keep_images,
        )

    def training(self, method: Method, values: Keys, config: Config | None, seed: int) -> Training | None:
        """The run that makes a model; None where that is the given checkpoint."""
        before = self._base(seed)
        if config is None:
            return before
        base = self._given_key if before is None else before.folder.name
        pretrained = self.study.settings.base.checkpoint if before is None else str(before.folder)
        trained = {key: value for key, value in values.items() if not key.startswith(SAMPLING)}
        return self._run(f"train {_title(method, trained)}, seed {seed}", config, seed, base, pretrained, before)

    def _base(self, seed: int) -> Training | None:
        if self.study.base is None:
            return None
        return self._run(f"pretrain the base, seed {seed}", self.study.base, seed, None, None, None)

    def _run(
        self, title: str, config: Config, seed: int, base: str | None, pretrained: str | None, before: Training | None
    ) -> Training:
        config = replace(config, training=replace(config.training, seed=seed, pretrained_checkpoint=pretrained))
        kind = "base" if before is None and pretrained is None else config.objective.name
        folder = self.output / TRAINED / f"{kind}-{digest(training_contents(config, base))}"
        training = replace(config.training, output_dir=str(folder))
        logging = replace(config.logging, progress_bar=False)
        return Training(title, folder, replace(config, training=training, logging=logging), before)


@dataclass(frozen=True)
class Plan:
    """A study's tasks as far as they are known.

    Attributes:
        trials: of every tuned method.
        chosen: of every method whose trials are done: the best settings, or None where none of them finished.
        rows: of every method with chosen settings.
    """

    trials: dict[str, list[tuple[Keys, Sampling]]]
    chosen: dict[str, Keys | None]
    rows: list[Row]

    @property
    def tasks(self) -> list[Task]:
        """All tasks once each, each behind the one that it needs."""
        samplings = [sampling for trials in self.trials.values() for _, sampling in trials]
        samplings += [sampling for row in self.rows for sampling in row.samplings]
        found: dict[Path, Task] = {}
        for sampling in samplings:
            for task in (*_before(sampling), sampling):
                found.setdefault(task.folder, task)
        return list(found.values())


def make_plan(planner: Planner, outcomes: Outcomes) -> Plan:
    """What there is to do, given how tasks have ended.

    Args:
        planner: of the study.
        outcomes: a task's result, None while there is none; it is asked about trials only.
    """
    study = planner.study
    trials = {method.name: planner.trials(method) for method in study.tuned}
    chosen: dict[str, Keys | None] = {BASE: {}}
    for name, tried in trials.items():
        results = [(values, outcomes(sampling)) for values, sampling in tried]
        if all(result is not None for _, result in results):
            chosen[name] = best(results, study.settings.tune_by)
    rows = [
        row
        for name, values in chosen.items()
        if values is not None
        for row in planner.rows(study.methods[name], values)
    ]
    return Plan(trials, chosen, rows)


def best(results: list[tuple[Keys, Outcome]], metric: str) -> Keys | None:
    """The settings with the lowest FID, or the highest of another metric; the first of equals.

    Returns:
        None where no trial finished.
    """
    finished = [(values, outcome[metric]) for values, outcome in results if outcome["status"] == FINISHED]
    if not finished:
        return None
    sign = 1 if metric == "fid" else -1
    return min(finished, key=lambda one: sign * one[1])[0]


def expected_tasks(planner: Planner) -> int:
    """About how many tasks the study has, before it is known which settings will be chosen."""
    first = {method.name: method.trials[0] for method in planner.study.methods.values()}
    rows = [row for name, values in first.items() for row in planner.rows(planner.study.methods[name], values)]
    return len(Plan({method.name: planner.trials(method) for method in planner.study.tuned}, {}, rows).tasks)


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
