"""A study with its files: the settings of each method, the runs of these settings, their cost, and the program."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_cca import platform
from megatron_cca.checkpoint import layout
from megatron_cca.checkpoint.summary import saved_config
from megatron_cca.config import Config, ModelConfig
from megatron_cca.config.load import config_from_dict, config_to_dict, load_config
from megatron_cca.data import with_sizes_of_data
from megatron_cca.errors import UserError, error_context
from megatron_cca.io.output_folders import claimed
from megatron_cca.io.outputs import write_json, write_text
from megatron_cca.lab.studies import (
    DRAWING,
    SAMPLING,
    DrawingConfig,
    Keys,
    MethodSettings,
    SamplingConfig,
    StudySettings,
    from_plain,
    read_study,
)
from megatron_cca.models import resolve_architecture, tiny_architecture
from megatron_cca.models.architecture import only_grid
from megatron_cca.objectives.base import inherited

if TYPE_CHECKING:
    from megatron_cca.lab.studies.running import TaskQueue

BASE, OBJECTIVE = "base", "objective.name"
# These keys differ from run to run. The study sets them.
_OWN_KEYS = (
    "training.output_dir",
    "training.seed",
    "training.pretrained_checkpoint",
    "data.partner_path",
    "reference.checkpoint",
    "reference.cache",
)
_FORWARD, _FORWARD_BACKWARD = 1, 3
_DIGITS_GRID = (4, 4)
TABLE, RESULTS = "table.md", "results.json"


@dataclass(frozen=True)
class ConfiguredRun:
    """A run without its seed: the values of a method's keys, put in.

    Attributes:
        config: the configuration of the training, or of each round of it. None for the base.
        sampling: how its images are drawn.
        drawing: what is drawn before each round to train on. None if nothing is.
    """

    config: Config | None
    sampling: SamplingConfig
    drawing: DrawingConfig | None = None


@dataclass(frozen=True)
class Method:
    """A method of a study.

    Attributes:
        name, label: its name in files, and in tables and plots.
        run: without the settings below.
        trials: settings to try on the tuning seed.
        sweep: settings to report beside the chosen ones; may be empty.
    """

    name: str
    label: str
    run: ConfiguredRun
    trials: list[Keys]
    sweep: list[Keys]
    where: str = ""
    _configured: dict[tuple, ConfiguredRun] = field(default_factory=dict, compare=False, repr=False)

    @property
    def config(self) -> Config | None:
        """The configuration of :attr:`run`."""
        return self.run.config

    def configured(self, values: Mapping[str, Any]) -> ConfiguredRun:
        """Return the run of settings.

        Raises:
            UserError: a key that does not apply to the method, or an invalid value; names file and key.
        """
        key = tuple((name, repr(value)) for name, value in values.items())
        if key not in self._configured:
            with error_context(self.where):
                self._configured[key] = with_keys(self.run, values)
        return self._configured[key]


@dataclass(frozen=True)
class Study:
    """A study's file and its contents.

    Attributes:
        path: the file.
        settings: the settings in the file.
        base: configuration of the base's pretraining; None if there is a checkpoint.
        model: the base's ``model`` section.
        methods: the methods by name; the first is the base without guidance, which each study has.
    """

    path: Path
    settings: StudySettings
    base: Config | None
    model: ModelConfig
    methods: dict[str, Method]

    @property
    def tuned(self) -> list[Method]:
        """All methods but the base.

        The base has nothing to tune.
        """
        return [method for name, method in self.methods.items() if name != BASE]


def open_study(path: Path) -> Study:
    """Read a study's file and the configurations that it names.

    Raises:
        UserError: an unreadable file, an unknown key or an invalid value; one line that names file and key.
    """
    settings = read_study(path)
    base = _base(path, settings)
    with error_context(path):
        model = base.model if base is not None else _model_of_checkpoint(settings.base.checkpoint)
    own_grid = with_own_grid(settings.sampling, model)
    settings = replace(settings, sampling=own_grid, prompts=_prompts(path, settings.prompts))
    methods = {BASE: Method(BASE, "base", ConfiguredRun(None, settings.sampling), [{}], [])}
    for name, method in settings.methods.items():
        methods[name] = _method(path, settings, name, method)
    return Study(path, settings, base, model, methods)


def _prompts(path: Path, name: str) -> str:
    """Return the path of the prompts, which come beside the study's file with a study of the package."""
    beside = path.parent / name
    return str(beside) if beside.is_file() and not Path(name).is_file() else name


def _model_of_checkpoint(checkpoint: str) -> ModelConfig:
    return saved_config(layout.resolve(checkpoint, "base.checkpoint"), "base.checkpoint").model


def with_own_grid(sampling: SamplingConfig, model: ModelConfig) -> SamplingConfig:
    """Return the settings, with what they leave out of the grid: that of the model's only one, or of the digits'."""
    architecture = resolve_architecture(model)
    is_of_digits = architecture.vocabulary == tiny_architecture(model).vocabulary
    height, width = only_grid(architecture) or (_DIGITS_GRID if is_of_digits else (None, None))
    return replace(sampling, height=sampling.height or height, width=sampling.width or width)


def _base(path: Path, settings: StudySettings) -> Config | None:
    base, where = settings.base, f"{path}: base"
    if (base.config is None) == (base.checkpoint is None):
        raise UserError(f"{where}: needs either a config to pretrain it with or a checkpoint")
    if base.config is None:
        if base.set:
            raise UserError(f"{where}.set: of no use beside a checkpoint; leave it out")
        return None
    config = _config(path, base.config, where)
    changes = [(f"{path}: set", settings.set), (f"{where}.set", base.set)]
    return with_sizes_of_data(_changed(ConfiguredRun(config, settings.sampling), changes).config)


def _method(path: Path, settings: StudySettings, name: str, method: MethodSettings) -> Method:
    where = f"{path}: methods.{name}"
    if name == BASE:
        raise UserError(f"{where}: every study has the base, guidance-free, by itself; take another name")
    config, changes = None, [(f"{where}.set", method.set)]
    if method.config is not None:
        config = _config(path, method.config, where)
        changes.insert(0, (f"{path}: set", settings.set))
    run = _changed(ConfiguredRun(config, settings.sampling, method.drawing), changes)
    if run.config is not None:
        run = replace(run, config=with_sizes_of_data(run.config))
    elif run.drawing is not None:
        raise UserError(f"{where}.drawing: nothing is trained on these images; give a config, or leave it out")
    sweep = grid(method.sweep) if method.sweep else []
    return Method(name, method.label or name, run, grid(method.tune), sweep, where)


def _config(path: Path, name: str, where: str) -> Config:
    with error_context(f"{where}.config"):
        config = load_config(path.parent / name)
    if config.reference.strategy == "cached":
        raise UserError(f"{where}.config: reference.strategy cached is of one base, a study has several; take another")
    return config


def _changed(run: ConfiguredRun, changes: Sequence[tuple[str, Keys]]) -> ConfiguredRun:
    for where, keys in changes:
        with error_context(where):
            run = with_keys(run, keys)
    return run


def with_keys(run: ConfiguredRun, keys: Mapping[str, Any]) -> ConfiguredRun:
    """Return a run with changed keys, such as ``objective.beta`` and ``sampling.guidance_scale``.

    Another ``objective.name`` removes the keys that the new objective does not have.

    Raises:
        UserError: an unknown key, an invalid value, or a key of training or drawing where there is none.
    """
    trees = {SAMPLING: asdict(run.sampling)}
    if run.drawing is not None:
        trees[DRAWING] = asdict(run.drawing)
    if run.config is not None:
        trees["config"] = config_to_dict(run.config)
        if OBJECTIVE in keys:
            trees["config"]["objective"] = inherited(trees["config"]["objective"], keys[OBJECTIVE])
    for key, value in keys.items():
        _set(trees, key, value)
    kinds = {SAMPLING: SamplingConfig, DRAWING: DrawingConfig}
    drawn = {prefix: from_plain(kinds[prefix], trees[prefix], prefix) for prefix in kinds if prefix in trees}
    for prefix, settings in drawn.items():
        if settings.guidance_scale > 0 and settings.contrastive_top_k > 0:
            raise UserError(f"{prefix}contrastive_top_k: does not go with a guidance scale; set one of them to 0")
    config = config_from_dict(trees["config"], typed=True) if run.config is not None else None
    return ConfiguredRun(config, drawn[SAMPLING], drawn.get(DRAWING))


def _set(trees: dict[str, dict], key: str, value: Any) -> None:
    section, dot, name = key.partition(".")
    if not (dot and section and name):
        raise UserError(f"{key}: expected section.key, such as optimizer.lr or sampling.guidance_scale")
    if key in _OWN_KEYS:
        raise UserError(f"{key}: is the study's own to set; leave it out")
    if section + dot in (SAMPLING, DRAWING):
        if section + dot not in trees:
            raise UserError(f"{key}: nothing is drawn to train on here; give the method a drawing section")
        trees[section + dot][name] = value
    elif "config" not in trees:
        raise UserError(f"{key}: nothing is trained here; give a config, or keys that begin with {SAMPLING}")
    else:
        trees["config"].setdefault(section, {})[name] = value


def grid(values: Mapping[str, Sequence[Any]]) -> list[Keys]:
    """Return all combinations of the values.

    The last key changes fastest. Without keys there is one combination, the empty one.
    """
    return [dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())]


def passes_per_sample(config: Config) -> int:
    """Return the passes that training needs for one sample.

    They are 3 for plain likelihood, 6 for a mixture of two rows, and 8 for an objective that compares pairs with a
    reference. Each row passes through the policy, forward and backward, and through the reference, forward. A backward
    counts as two passes.
    """
    objective = config.objective
    return objective.rows_per_sample * (_FORWARD_BACKWARD + _FORWARD * objective.needs_reference)


def passes_of_drawing(run: ConfiguredRun) -> int:
    """Return the passes of what a run draws before each round; 0 if it draws nothing.

    A drawn token costs as much as one that passes forward in training.
    """
    return _images_per_round(run) * run.drawing.forwards_per_token if run.drawing is not None else 0


def passes_of_run(run: ConfiguredRun) -> int:
    """Return the passes of a whole run, of all its rounds; 0 if nothing is trained."""
    if run.config is None:
        return 0
    training = run.config.training
    trained = training.train_iters * training.global_batch_size * passes_per_sample(run.config)
    return trained if run.drawing is None else run.drawing.rounds * (trained + passes_of_drawing(run))


def cost_of_run(run: ConfiguredRun) -> str:
    """Return the factors of :func:`passes_of_run` as text, of a run that trains something."""
    training, drawing = run.config.training, run.drawing
    cost = (
        f"{training.train_iters} steps x {training.global_batch_size} samples x {passes_per_sample(run.config)} passes"
    )
    if drawing is None:
        return cost
    cost += f" + {_images_per_round(run)} drawn images x {drawing.forwards_per_token}"
    return f"{drawing.rounds} x ({cost})" if drawing.rounds > 1 else cost


def _images_per_round(run: ConfiguredRun) -> int:
    # Imported late: Megatron-Core must not be imported before the platform is installed.
    from megatron_cca.data.digits import data_folders
    from megatron_cca.data.manifest import read_manifest

    return sum(read_manifest(folder)["num_samples"] for folder in data_folders(run.config))


def run_study(path: Path, output: Path, workers: int, device: platform.DeviceChoice) -> None:
    """Do the missing tasks of a study; write its table, numbers and plots to ``output/<name>``.

    Under torchrun (WORLD_SIZE above 1) all ranks do each task together.

    Args:
        path: the study's file.
        output: the folder that studies share; tasks with a result in it are not done again.
        workers: number of processes, each of which does whole tasks; 1 under torchrun.
        device: the device of the processes.

    Raises:
        UserError: a study that cannot run or that compares unequal runs (before any task), or anything that a task
            refuses.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if workers > 1 and world_size > 1:
        raise UserError(f"--workers: {workers} is for one process, this job has {world_size}; leave it out")
    study = open_study(path)
    platform.install_option(device)
    _run(study, output, workers, world_size)


def _run(study: Study, output: Path, workers: int, world_size: int) -> None:
    # Imported late: Megatron-Core must not be imported before the platform is installed.
    from megatron_cca.lab.studies.checks import check_study
    from megatron_cca.lab.studies.running import TaskQueue, run_in_pool, run_together
    from megatron_cca.lab.studies.schedule import TaskFactory

    check_study(study, world_size)
    is_first = os.environ.get("RANK", "0") == "0"
    with claimed(output) if is_first else nullcontext():
        queue = TaskQueue(TaskFactory(study, output.resolve()))
        if world_size > 1 or queue.ready():
            run_in_pool(queue, workers) if workers > 1 else run_together(queue)
        if is_first:
            _write(study, queue)


def _write(study: Study, queue: TaskQueue) -> None:
    # Imported late: the import of matplotlib takes a second. A mistyped file name must fail faster.
    from megatron_cca.lab.studies.plots import plot
    from megatron_cca.lab.studies.results import as_json, collect, table

    results = collect(study, queue.schedule, queue.outcome)
    folder = queue.factory.output / study.settings.name
    folder.mkdir(parents=True, exist_ok=True)
    for one in study.settings.plots:
        plot(folder, results, one)
    write_json(folder / RESULTS, as_json(results))
    write_text(folder / TABLE, table(results))
    print(f"wrote {folder / TABLE}, {RESULTS} and {len(study.settings.plots)} plot(s)")
