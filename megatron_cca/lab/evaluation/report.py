"""The work of megatron-cca evaluate between its options and its end: numbers, metrics.json, table.md and plots."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from tqdm import tqdm

from megatron_cca import __version__
from megatron_cca.errors import UserError, error_context
from megatron_cca.io.output_folders import replacing
from megatron_cca.lab import PARTIAL, markdown_table
from megatron_cca.lab.evaluation import MOMENT_METRICS, PART_OF, EvaluateOptions
from megatron_cca.lab.evaluation.checks import (
    REFERENCE,
    SAMPLES,
    ChosenMetrics,
    check_annotations,
    choose_metrics,
    classifier_of,
    usable_moments,
)
from megatron_cca.lab.evaluation.classifiers import ClassAccuracy, Classifier, class_accuracy, open_classifier
from megatron_cca.lab.evaluation.clip import ClipScorer, TruncatedPrompts, open_scorer
from megatron_cca.lab.evaluation.detectors import ColorNamer, Detector, geneval_of
from megatron_cca.lab.evaluation.extractors import PUBLISHED_SHA256, WEIGHTS, WIDTHS, Extractor, open_extractor, widths
from megatron_cca.lab.evaluation.geneval import COLUMNS as GENEVAL_COLUMNS
from megatron_cca.lab.evaluation.geneval import GenevalResult, marking
from megatron_cca.lab.evaluation.image_sets import ImageSet, read_images
from megatron_cca.lab.evaluation.judges import ensure_judge
from megatron_cca.lab.evaluation.plots import class_accuracy_bars, draw_samples, fid_is_plane
from megatron_cca.lab.evaluation.rewards import Rewards, heading_of, rewards_of
from megatron_cca.lab.evaluation.statistics import SAVE, check_owner, check_statistics, save_statistics
from megatron_cca.version import installed_versions

METRICS_FILE, TABLE_FILE = "metrics.json", "table.md"
PLANE_FILE, BARS_FILE, SAMPLES_FILE = "fid_is.png", "class_accuracy.png", "samples-{}.png"
_PACKAGES = ("torch", "torch-fidelity", "numpy", "scipy", "scikit-learn", "transformers")
# Key, heading with the direction of improvement, and whether more is better.
_COLUMNS = (
    ("fid", "FID ↓", False),
    ("sfid", "sFID ↓", False),
    ("inception_score", "IS ↑", True),
    ("kid", "KID ↓", False),
    ("precision", "precision ↑", True),
    ("recall", "recall ↑", True),
    ("density", "density ↑", True),
    ("coverage", "coverage ↑", True),
    ("vendi", "Vendi ↑", True),
    ("cmmd", "CMMD ↓", False),
    ("class_accuracy", "accuracy ↑", True),
    ("clip_score", "CLIP score ↑", True),
    *GENEVAL_COLUMNS,
)
_IN_THOUSANDTHS = {"precision", "recall", "density", "coverage", "cmmd", "class_accuracy"}
_IN_THOUSANDTHS |= {key for key, *_ in GENEVAL_COLUMNS}


@dataclass(frozen=True)
class SetResult:
    """The numbers of a set.

    Attributes:
        metrics: metrics by name, from :func:`megatron_cca.lab.evaluation.fidelity.fidelity`.
        left_out: metric -> why it was not computed.
        accuracy: class accuracy, if there are labels and a classifier.
        clip_scores: float32 ``[N]``, if there are prompts and a CLIP.
        clip_cut: the number of prompts that the CLIP reads only in part.
        rewards: those of each scorer by its name, if there are prompts.
        geneval: the verdicts of GenEval, if there are prompts and a detector.
    """

    name: str
    images: ImageSet
    metrics: dict[str, float]
    left_out: dict[str, str]
    accuracy: ClassAccuracy | None = None
    clip_scores: np.ndarray | None = None
    clip_cut: TruncatedPrompts | None = None
    rewards: Mapping[str, Rewards] = MappingProxyType({})
    geneval: GenevalResult | None = None


@dataclass(frozen=True)
class Evaluation:
    """All results with their settings.

    ``extractor_origin`` and ``detector_origin`` name the source of the networks' weights.
    """

    settings: EvaluateOptions
    reference: ImageSet
    extractor_origin: dict[str, str]
    sets: list[SetResult]
    detector_origin: dict[str, str] | None = None


def evaluate(settings: EvaluateOptions, device: torch.device) -> Evaluation:
    """Read the images, decide what can be computed, and compute it.

    Progress bars go to standard error.

    Raises:
        UserError: images that cannot be read; too few images for a metric that was asked for by name; no labels for a
            classifier or no prompts for CLIP; nothing that can be computed.
    """
    sets = {name: _read(SAMPLES, path) for name, path in settings.sets.items()}
    reference = _read(REFERENCE, settings.reference)
    check_annotations(settings, sets)
    check_owner(reference, settings.reference, settings.network)
    if settings.judge is not None:
        ensure_judge(settings.judge, reference.images, reference.labels)
    extractor = None
    if settings.metrics != () and settings.network not in WIDTHS:
        # The outputs of a user's network show only when it runs.
        extractor = _open(settings, device)
    first = next(iter(sets.values())).images
    known = WIDTHS.get(settings.network, {}) if extractor is None else widths(extractor, first)
    chosen = choose_metrics(settings, sets, reference, known)
    if extractor is None and any(one.metrics for one in chosen.values()):
        extractor = _open(settings, device)
    if extractor is not None:
        check_statistics(reference, settings.reference, settings.network, extractor.origin, sets.values())
    if settings.save_statistics is not None and not (
        len(reference.images) and any("fid" in one.metrics for one in chosen.values())
    ):
        raise UserError(f"{SAVE}: FID of a reference with images is not computed, so there is nothing to keep")
    # Open both before the long computation. Errors in them appear early.
    name_of_classifier = classifier_of(settings, sets)
    classifier = open_classifier(name_of_classifier) if name_of_classifier is not None else None
    scorer = ClipScorer(settings.clip, device, settings.numbers.batch_size) if settings.clip is not None else None
    scorers = {name: open_scorer(name, device) for name in settings.scorer}
    detector = Detector(settings.detector, device) if settings.detector is not None else None
    colors = ColorNamer(scorer) if scorer is not None else None
    metrics = _fidelities(settings, sets, reference, extractor, chosen)
    accuracies = _accuracies(sets, classifier) if classifier is not None else {}
    cuts = _cuts(sets, scorer) if scorer is not None else {}
    scores = _clip_scores(sets, scorer) if scorer is not None else {}
    results = [
        SetResult(
            name,
            images,
            metrics[name],
            chosen[name].left_out,
            accuracies.get(name),
            scores.get(name),
            cuts.get(name),
            rewards_of(name, images, scorers, settings.numbers.batch_size),
            geneval_of(name, images, detector, colors) if detector is not None else None,
        )
        for name, images in sets.items()
    ]
    origin = extractor.origin if extractor is not None else {}
    settings = replace(settings, classifier=name_of_classifier)
    return Evaluation(settings, reference, origin, results, None if detector is None else detector.origin)


def _read(option: str, path: str) -> ImageSet:
    with error_context(option):
        found = read_images(path)
    for notice in found.notices:
        print(f"{option} {path}: {notice}", file=sys.stderr)
    return found


def _cuts(sets: dict[str, ImageSet], scorer: ClipScorer) -> dict[str, TruncatedPrompts]:
    found = {name: scorer.cut(one.prompts) for name, one in sets.items() if one.prompts is not None}
    for name, cut in found.items():
        if (line := cut.line()) is not None:
            print(f"{name}: {line}", file=sys.stderr)
    return found


def _open(settings: EvaluateOptions, device: torch.device) -> Extractor:
    extractor = open_extractor(settings.network, settings.inception_weights).to(device)
    if settings.network == "inception" and not extractor.origin["sha256"].startswith(PUBLISHED_SHA256):
        print(
            f"{WEIGHTS}: the SHA-256 of {settings.inception_weights} does not begin with {PUBLISHED_SHA256}, as the "
            "published file's name says it does; do not compare these numbers with papers'",
            file=sys.stderr,
        )
    return extractor


def _fidelities(
    settings: EvaluateOptions,
    sets: dict[str, ImageSet],
    reference: ImageSet,
    extractor: Extractor | None,
    chosen: dict[str, ChosenMetrics],
) -> dict[str, dict[str, float]]:
    if extractor is None:
        return {name: {} for name in sets}
    # Imported late: the import of torch-fidelity takes seconds.
    from megatron_cca.lab.evaluation.fidelity import ReferenceImages, fidelity

    real = ReferenceImages(reference.images, extractor, usable_moments(settings, reference))
    found = {}
    for name, images in sets.items():
        total = len(images.images) + (0 if found else len(real))
        with _bar(f"features of {name}", total) as bar:
            numbers = replace(settings.numbers, metrics=chosen[name].metrics)
            with error_context(f"{SAMPLES} {name}"):
                found[name] = fidelity(images.images, real, extractor, numbers, bar.update)
    if settings.save_statistics is not None:
        parts = {PART_OF[name] for one in chosen.values() for name in one.metrics if name in MOMENT_METRICS}
        moments = {part: tuple(real.moments(part).values()) for part in parts}
        save_statistics(settings.save_statistics, moments, extractor, reference.images)
    return found


def _accuracies(sets: dict[str, ImageSet], classifier: Classifier) -> dict[str, ClassAccuracy]:
    return {
        name: class_accuracy(one.images, one.labels, classifier) for name, one in sets.items() if one.labels is not None
    }


def _clip_scores(sets: dict[str, ImageSet], scorer: ClipScorer) -> dict[str, np.ndarray]:
    found = {}
    for name, one in sets.items():
        if one.prompts is not None:
            with _bar(f"CLIP scores of {name}", len(one.images)) as bar:
                found[name] = scorer.scores(one.images, one.prompts, bar.update)
    return found


def _bar(description: str, total: int) -> tqdm:
    return tqdm(total=total, unit="image", desc=description, disable=None)


def former_files(output: Path) -> set[str]:
    """Return the names of the files that a former report in the folder may have."""
    sheets = {path.name for path in output.glob(SAMPLES_FILE.format("*"))}
    return {METRICS_FILE, TABLE_FILE, PLANE_FILE, BARS_FILE, *sheets}


def write_report(output: Path, evaluation: Evaluation) -> list[str]:
    """Write all files into a :func:`reserved_folder`, or none.

    They replace those of a former report.

    Returns:
        The files' names. ``metrics.json`` arrives last: if it exists, all files exist.

    Raises:
        UserError: the file system reports an error.
    """
    with replacing(output, former_files(output), PARTIAL, METRICS_FILE) as partial:
        (partial / TABLE_FILE).write_text(table(evaluation) + "\n")
        _draw(partial, evaluation)
        (partial / METRICS_FILE).write_text(json.dumps(as_json(evaluation), indent=1, ensure_ascii=False) + "\n")
        names = sorted((path.name for path in partial.iterdir()), key=lambda name: (name == METRICS_FILE, name))
    return names


def as_json(evaluation: Evaluation) -> dict:
    """Return settings, versions, counts and numbers at full precision as plain data."""
    settings = evaluation.settings
    numbers = {name: value for name, value in asdict(settings.numbers).items() if name != "metrics"}
    return {
        "version": __version__,
        "packages": installed_versions(_PACKAGES),
        "extractor": {"name": settings.network, **evaluation.extractor_origin},
        "settings": {
            "metrics": settings.metrics,  # null: all that could be computed
            **numbers,
            "classifier": settings.classifier,
            "clip": None if settings.clip is None else str(settings.clip),
            "scorers": settings.scorer,
            "detector": evaluation.detector_origin,
            "clip_score": "100 * max(cosine, 0)",
        },
        "reference": {
            "path": settings.reference,
            **_extent(evaluation.reference.images),
            "brings_moments_of": sorted(evaluation.reference.moments or ()),
            **_notices(evaluation.reference),
        },
        "sets": [_set_as_json(settings.sets[one.name], one) for one in evaluation.sets],
    }


def _set_as_json(path: str, one: SetResult) -> dict:
    found = {"name": one.name, "path": path, **_extent(one.images.images), **values(one)}
    if one.clip_scores is not None:
        found["clip_score_std"] = float(one.clip_scores.std(dtype=np.float64))
    if one.clip_cut is not None:
        found |= {"clip_prompts_cut": one.clip_cut.prompts, "clip_tokens": one.clip_cut.tokens}
    if one.rewards:
        found["rewards"] = {name: rewards.as_json() for name, rewards in one.rewards.items()}
    if one.geneval is not None:
        found["geneval_details"] = one.geneval.as_json()
    if one.accuracy is not None:
        found["class_accuracy_per_class"] = {str(label): share for label, share in one.accuracy.per_class.items()}
    return {**found, **_notices(one.images), "left_out": one.left_out}


def _notices(images: ImageSet) -> dict:
    """Return the notices about files that were not read.

    Without notices it is empty.
    """
    return {"notices": list(images.notices)} if images.notices else {}


def _extent(images: np.ndarray) -> dict:
    return {"images": len(images), "size": list(images.shape[1:3])}


def values(one: SetResult) -> dict[str, float]:
    """Return all numbers of a set by name, with class accuracy and the mean CLIP score."""
    found = dict(one.metrics)
    if one.accuracy is not None:
        found["class_accuracy"] = one.accuracy.overall
    if one.clip_scores is not None:
        found["clip_score"] = float(one.clip_scores.mean(dtype=np.float64))
    return found | ({} if one.geneval is None else one.geneval.values())


def table(evaluation: Evaluation) -> str:
    """Return a Markdown table with one row for each set.

    With several sets, the best value of each column is bold.
    """
    rows = [values(one) for one in evaluation.sets]
    settings, kept = evaluation.settings, evaluation.reference.statistics
    scorers = settings.scorer
    # A reward never stands without FID beside it.
    shown = {name for row in rows for name in row} | ({"fid"} if scorers or settings.detector else set())
    columns = [column for column in _COLUMNS if column[0] in shown]
    rows = [
        row | {name: rewards.mean for name, rewards in one.rewards.items()}
        for one, row in zip(evaluation.sets, rows, strict=True)
    ]
    columns += [(name, f"{heading_of(name)} ↑", True) for name in scorers]
    header = ["samples", "images", *(heading for _, heading, _ in columns)]
    cells = [
        [one.name, str(len(one.images.images)), *(_cell(key, row, rows, rising) for key, _, rising in columns)]
        for one, row in zip(evaluation.sets, rows, strict=True)
    ]
    count = len(evaluation.reference.images) if kept is None else kept.images
    lines = [markdown_table(header, cells, first_number=1), ""]
    lines += [f"Reference: {settings.reference}, {count} images; extractor: {settings.network}."]
    cuts = [(one.name, one.clip_cut.line()) for one in evaluation.sets if one.clip_cut is not None]
    lines += [f"CLIP score of {name}: {line}." for name, line in cuts if line is not None]
    lines += [
        f"{heading_of(name)} of {one.name}: {line}."
        for one in evaluation.sets
        for name, rewards in one.rewards.items()
        if (line := rewards.cut_line()) is not None
    ]
    if settings.detector is not None:
        results = [(one.name, one.geneval) for one in evaluation.sets if one.geneval is not None]
        missing = [line for name, result in results if (line := result.line(name)) is not None]
        lines += [marking(settings.detector), *missing]
    if (scorers or settings.detector) and not all("fid" in row for row in rows):
        lines += [
            "A reward alone misleads: a model can raise it and lose its likeness to real images. Compute FID, too."
        ]
    return "\n".join(lines)


def _cell(key: str, row: dict[str, float], rows: list[dict[str, float]], rising: bool) -> str:
    if key not in row:
        return "–"
    column = [one[key] for one in rows if key in one]
    best = len(column) > 1 and row[key] == (max if rising else min)(column)
    # The addition of 0 after rounding turns -0 into 0. Identical sets may have FID -0.
    shown = f"{row[key]:.4g}" if key == "kid" else f"{round(row[key], _digits(key)) + 0:.{_digits(key)}f}"
    return f"**{shown}**" if best else shown


def _digits(key: str) -> int:
    return 3 if key in _IN_THOUSANDTHS else 2


def _draw(folder: Path, evaluation: Evaluation) -> None:
    rows = {one.name: values(one) for one in evaluation.sets}
    points = {
        name: (row["fid"], row["inception_score"]) for name, row in rows.items() if {"fid", "inception_score"} <= {*row}
    }
    if len(points) > 1:
        fid_is_plane(folder / PLANE_FILE, points)
    accuracies = {one.name: one.accuracy.per_class for one in evaluation.sets if one.accuracy is not None}
    if accuracies:
        class_accuracy_bars(folder / BARS_FILE, accuracies)
    for one in evaluation.sets:
        draw_samples(folder / SAMPLES_FILE.format(one.name), one.name, one.images)
