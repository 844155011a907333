"""The checks of a study before any of its tasks runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from megatron_cca.config import ModelConfig
from megatron_cca.data import DIGITS
from megatron_cca.data.manifest import read_manifest
from megatron_cca.data.sources import DEFAULTS
from megatron_cca.data.sources.idx import recognises
from megatron_cca.errors import UserError, error_context
from megatron_cca.generation.prompts import check_conditions, prompts_named
from megatron_cca.lab.evaluation import WORDS, Counts, FidelitySettings, obstacle
from megatron_cca.lab.evaluation.classifiers import check_classifier, is_function_spec, load_function
from megatron_cca.lab.evaluation.clip import check_scorer
from megatron_cca.lab.evaluation.extractors import WIDTHS, check_extractor
from megatron_cca.lab.evaluation.image_sets import check_path, list_folder
from megatron_cca.lab.evaluation.shard_images import is_shard_folder
from megatron_cca.lab.studies import Keys, PlotSettings, StudySettings
from megatron_cca.lab.studies.study import (
    BASE,
    ConfiguredRun,
    Method,
    Study,
    cost_of_run,
    passes_of_drawing,
    passes_of_run,
    passes_per_sample,
)
from megatron_cca.models import resolve_architecture, tiny_architecture
from megatron_cca.models.architecture import grid_misfit
from megatron_cca.objectives import OBJECTIVES
from megatron_cca.training import pairs_of
from megatron_cca.training.checks import check_data, check_new_run

CONTROL = "control"
# The training of one method may cost more than another's by this share.
TOLERANCE = 0.05


def check_study(study: Study, world_size: int) -> None:
    """Refuse a study with an unfair comparison, or one that cannot run.

    Args:
        study: a study from :func:`open_study`.
        world_size: number of processes that do a task together.

    Raises:
        UserError: one line that names file and key.
    """
    with error_context(study.path):
        _check_seeds(study.settings)
        _check_control(study)
        _check_trials(study)
        _check_evaluation(study.settings)
    _check_runs(study, world_size)
    with error_context(study.path):
        _check_conditions(study)
        _check_grids(study)
        _check_equal_compute(study)
        _check_compared(study)
        check_plots(study)


def variants(method: Method) -> Iterator[Keys]:
    """Yield all settings at which a method may run."""
    for trial in method.trials:
        yield trial
        for swept in method.sweep:
            yield {**trial, **swept}


def _check_seeds(settings: StudySettings) -> None:
    if len(set(settings.seeds)) < len(settings.seeds):
        raise UserError(f"seeds: {settings.seeds} has one twice; give different ones")
    if settings.tuning_seed in settings.seeds:
        raise UserError(
            f"tuning_seed: {settings.tuning_seed} is one of seeds; take another, so that no result is tuned on itself"
        )


def _check_control(study: Study) -> None:
    control = study.methods.get(CONTROL)
    is_plain = control is not None and control.config is not None and control.run.drawing is None
    if not is_plain or not control.config.objective.is_plain_likelihood:
        plain = " or ".join(name for name, kind in OBJECTIVES.items() if kind.is_plain_likelihood)
        raise UserError(
            f"methods.{CONTROL}: every study needs it: further training of the base with objective {plain}, on its own "
            "data, at the other methods' cost"
        )


def _check_trials(study: Study) -> None:
    for method in study.tuned:
        if len(method.trials) != study.settings.trials:
            raise UserError(
                f"methods.{method.name}.tune: {len(method.trials)} settings, but trials is {study.settings.trials}; "
                "every method is tried at equally many"
            )
        for part, settings in (("tune", method.trials), ("sweep", method.sweep)):
            seen = [repr(values) for values in settings]
            if len(set(seen)) < len(seen):
                raise UserError(f"methods.{method.name}.{part}: a value is given twice; leave one of them out")


def _check_evaluation(settings: StudySettings) -> None:
    if "fid" not in settings.metrics:
        raise UserError("metrics: fid is missing, by which a collapse is told")
    if settings.tune_by not in (*settings.metrics, "accuracy"):
        raise UserError(f"tune_by: {settings.tune_by} is not among metrics; add it")
    if settings.classifier is None and settings.tune_by == "accuracy":
        raise UserError("tune_by: accuracy needs a classifier")
    with error_context("reference"):
        check_path(settings.reference)
    with error_context("extractor"):
        check_extractor(settings.extractor, settings.inception_weights and Path(settings.inception_weights))
    if settings.classifier is not None:
        with error_context("classifier"):
            check_classifier(settings.classifier)
    if settings.scorer is not None:
        with error_context("scorer"):
            check_scorer(settings.scorer)
    for key in ("extractor", "classifier"):
        spec = getattr(settings, key)
        if spec is not None and is_function_spec(spec):
            load_function(spec, key)
    _check_samples(settings)
    _check_prompts(settings)


def _check_samples(settings: StudySettings) -> None:
    """Refuse too few samples or too few reference images.

    The needs of a user's own extractor show only when it runs.
    """
    widths = WIDTHS.get(settings.extractor, {})
    numbers = FidelitySettings(inception_score_splits=settings.inception_score_splits)
    real = _reference_size(settings.reference)
    for key in ("samples", "tuning_samples"):
        count = getattr(settings, key)
        for metric in settings.metrics if count is not None and widths else ():
            problem = obstacle(metric, Counts(count, real), widths, numbers)
            if problem is not None:
                raise UserError(f"{key if problem.side == 'samples' else problem.side}: {problem.reason}")


def _reference_size(reference: str) -> int:
    """Return the number of images in a reference folder.

    For a file it is a very large number: reading it takes long, and an archive may have the moments of more images.
    """
    folder = Path(reference)
    if reference in WORDS or not folder.is_dir() or recognises(folder, DEFAULTS):
        return sys.maxsize
    if is_shard_folder(folder):
        with error_context("reference"):
            return read_manifest(folder)["num_samples"]
    with error_context("reference"):
        return len(list_folder(folder).files)


def _check_prompts(settings: StudySettings) -> None:
    if settings.prompts == DIGITS:
        return
    with error_context("prompts"):
        prompts = prompts_named(settings.prompts)
    if settings.classifier is not None and any(prompt.label is None for prompt in prompts):
        raise UserError("classifier: needs a label with every prompt; add them, or set classifier to null")


def _check_runs(study: Study, world_size: int) -> None:
    first = None
    for where, run in _runs(study):
        config = run.config
        with error_context(where):
            # The base does not exist yet. It has the same model.
            check_new_run(replace(config, training=replace(config.training, pretrained_checkpoint=None)), world_size)
            check_data(config)
            _check_drawing(run)
            if first is not None and config.parallel != first.parallel:
                raise UserError("parallel: must be the same for all runs of a study; put it into the study's own set")
            _check_model(study, config.model)
        first = first or config


def _runs(study: Study) -> Iterator[tuple[str, ConfiguredRun]]:
    """Yield all runs that train something, and where they stand in the files."""
    if study.base is not None:
        yield f"{study.path}: base", ConfiguredRun(study.base, study.settings.sampling)
    for method in study.tuned:
        for run in map(method.configured, variants(method)):
            if run.config is not None:
                yield method.where, run


def _check_drawing(run: ConfiguredRun) -> None:
    config = run.config
    partners = config.data.partner_path
    if partners is not None:
        raise UserError(
            f"data.partner_path: {partners}, which a study does not share; let the method draw its partners"
        )
    if run.drawing is None:
        return
    # Images are drawn for the samples of one folder.
    if isinstance(config.data.path, dict):
        raise UserError(f"drawing: data.path has {len(config.data.path)} folders; a method draws for one")
    if run.drawing.role == "partners" and pairs_of(config) != "images":
        raise UserError(
            f"drawing.role: partners, but objective {config.objective.name} has no pairs of images here; set "
            "data.pairs: images, or drawing.role: data"
        )


def _check_conditions(study: Study) -> None:
    model = study.model
    vocabulary = resolve_architecture(model).vocabulary
    if study.settings.prompts == DIGITS:
        # No caption or class of other models means a digit.
        if vocabulary != tiny_architecture(model).vocabulary:
            raise UserError("prompts: digits are for models of the digits; name a file of this model's prompts")
        return
    with error_context("prompts"):
        check_conditions(vocabulary, prompts_named(study.settings.prompts))


def _check_grids(study: Study) -> None:
    architecture = resolve_architecture(study.model)
    positions = architecture.max_position_embeddings
    for method in study.methods.values():
        for sampling in (method.configured(values).sampling for values in variants(method)):
            if sampling.height is None or sampling.width is None:
                raise UserError(f"sampling: {study.model.name} has images of any size; give their height and width")
            misfit = grid_misfit(architecture, 1, sampling.height, sampling.width)
            if misfit is not None:
                raise UserError(f"sampling: {misfit}")
            tokens = architecture.vocabulary.sequence_length(0, 0, sampling.height, sampling.width)
            if tokens > positions:
                raise UserError(
                    f"sampling: a grid of {sampling.height} x {sampling.width} takes {tokens} tokens beside the "
                    f"prompt, the model has {positions} positions; take a smaller height and width"
                )


def _check_model(study: Study, model: ModelConfig) -> None:
    ours, theirs = (asdict(resolve_architecture(one)) for one in (model, study.model))
    for name in ours:
        # Rotary positions have no weights. A run may use more positions than its base.
        if name != "max_position_embeddings" and ours[name] != theirs[name]:
            raise UserError(
                f"model: {name} is {ours[name]}, the base's {theirs[name]}; every method starts from the base"
            )


def _check_compared(study: Study) -> None:
    name = study.settings.compare
    if name is not None and name not in study.methods:
        raise UserError(f"compare: {name} is no method; there are {', '.join(study.methods)}")


def _check_equal_compute(study: Study) -> None:
    costs = [
        (passes_of_run(run), method.name, run)
        for method in study.tuned
        for run in map(method.configured, variants(method))
        if run.config is not None
    ]
    (least, one, cheapest), (most, other, dearest) = (pick(costs, key=lambda cost: cost[0]) for pick in (min, max))
    if most > (1 + TOLERANCE) * least:
        rounds, drawn = (dearest.drawing.rounds if dearest.drawing else 1), passes_of_drawing(dearest)
        step = dearest.config.training.global_batch_size * passes_per_sample(dearest.config)
        steps = max(0, round((least / rounds - drawn) / step))
        if steps == dearest.config.training.train_iters:
            advice = f"give methods.{one} more steps"
        else:
            advice = f"{steps} steps would"
        raise UserError(
            f"methods.{other}: costs {cost_of_run(dearest)} = {most}, methods.{one} {cost_of_run(cheapest)} = "
            f"{least}; all training must cost the same within {TOLERANCE:.0%}: {advice}"
        )


def file_name(plot: PlotSettings) -> str:
    """Return the name of a plot's PNG."""
    return f"{plot.file or plot.kind}.png"


def plotted_methods(study: Study, plot: PlotSettings) -> list[Method]:
    """Return the methods of a plot.

    It names them, or it takes all methods that have the keys of its kind.
    """
    if plot.methods is not None:
        return [study.methods[name] for name in plot.methods]
    methods = list(study.methods.values())
    return methods if plot.kind in ("comparison", "frontier") else [one for one in methods if _has_axes(one, plot)]


def swept_keys(method: Method) -> list[str]:
    """Return the keys of a method's sweep, in the order of the file."""
    return list(method.sweep[0]) if method.sweep else []


def check_plots(study: Study) -> None:
    """Refuse a plot of something that the study will not have.

    Raises:
        UserError: names the plot and the key.
    """
    plots = study.settings.plots
    if not plots:
        raise UserError(f"plots: is empty; give at least one, such as {{kind: {'frontier'}}}")
    for index, plot in enumerate(plots):
        with error_context(f"plots.{index}"):
            _check_plot(study, plot)
    names = [file_name(plot) for plot in plots]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise UserError(f"plots.{index}.file: {name} is another plot's already; give it a name of its own")


def _check_plot(study: Study, plot: PlotSettings) -> None:
    for name in plot.methods or ():
        if name not in study.methods:
            raise UserError(f"methods: {name} is none; there are {', '.join(study.methods)}")
    wanted = {"against": ("x",), "heatmap": ("x", "y")}.get(plot.kind, ())
    for axis in ("x", "y"):
        if (getattr(plot, axis) is not None) != (axis in wanted):
            is_missing = "is missing; give a key of a sweep" if axis in wanted else "is of no use; leave it out"
            raise UserError(f"{axis}: {is_missing} (kind {plot.kind})")
    if plot.kind in ("frontier", "against") and "inception_score" not in study.settings.metrics:
        raise UserError(f"kind: {plot.kind} draws inception_score; add it to metrics")
    methods = plotted_methods(study, plot)
    for method in methods:
        if wanted and not _has_axes(method, plot):
            keys = " and ".join(getattr(plot, axis) for axis in wanted)
            raise UserError(f"methods: {method.name} does not sweep {keys}")
    if plot.kind == "frontier" and not any(swept_keys(method) for method in methods):
        raise UserError("methods: none of them has a sweep; a frontier needs one")
    if wanted and not methods:
        raise UserError(f"x: no method sweeps {plot.x}")
    if plot.kind == "heatmap":
        _check_heatmap(plot, methods)


def _check_heatmap(plot: PlotSettings, methods: list[Method]) -> None:
    if len(methods) != 1:
        raise UserError(f"methods: a heatmap is of one method, found {', '.join(one.name for one in methods)}")
    if plot.x == plot.y or set(swept_keys(methods[0])) != {plot.x, plot.y}:
        raise UserError(f"methods: {methods[0].name} must sweep the two keys x and y and no others")


def _has_axes(method: Method, plot: PlotSettings) -> bool:
    keys = swept_keys(method)
    return method.name != BASE and all(key in keys for key in (plot.x, plot.y) if key is not None)
