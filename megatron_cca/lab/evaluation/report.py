"""The report of megatron-cca evaluate: metrics.json, table.md and plots."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from megatron_cca import __version__
from megatron_cca.io.output_folders import replacing
from megatron_cca.lab import PARTIAL, markdown_table
from megatron_cca.lab.evaluation.checks import usable_moments
from megatron_cca.lab.evaluation.geneval import COLUMNS as GENEVAL_COLUMNS
from megatron_cca.lab.evaluation.geneval import marking
from megatron_cca.lab.evaluation.image_sets import ImageSet
from megatron_cca.lab.evaluation.measuring import Evaluation, SetResult
from megatron_cca.lab.evaluation.plots import class_accuracy_bars, draw_samples, fid_is_plane
from megatron_cca.lab.evaluation.rewards import heading_of
from megatron_cca.version import installed_versions

METRICS_FILE, TABLE_FILE = "metrics.json", "table.md"
PLANE_FILE, BARS_FILE, SAMPLES_FILE = "fid_is.png", "class_accuracy.png", "samples-{}.png"
_PACKAGES = ("torch", "torch-fidelity", "numpy", "scipy", "scikit-learn", "transformers", "open_clip_torch")
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
    moments = evaluation.reference.moments or usable_moments(settings.network, evaluation.reference)
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
            "brings_moments_of": sorted(moments),
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
    extent = f"{count} images" if count else "mean and covariance alone"
    lines = [markdown_table(header, cells, first_number=1), ""]
    lines += [f"Reference: {settings.reference}, {extent}; extractor: {settings.network}."]
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
    if key.startswith("hpsv2:"):
        # Good models differ in its third decimal.
        return 4
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
