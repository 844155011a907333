"""The numbers of sets of images: the work of tools/evaluate.py between its options and its files."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import numpy as np
import torch
from tqdm import tqdm

from megatron_cca.errors import error_context
from megatron_cca.lab.evaluation.classifiers import ClassAccuracy, Classifier, class_accuracy, open_classifier
from megatron_cca.lab.evaluation.clip import ClipScorer, Cut
from megatron_cca.lab.evaluation.extractors import PUBLISHED_SHA256, WEIGHTS, WIDTHS, Extractor, open_extractor, widths
from megatron_cca.lab.evaluation.image_sets import ImageSet, read_images
from megatron_cca.lab.evaluation.planning import (
    REFERENCE,
    SAMPLES,
    EvaluationSettings,
    Plan,
    check_annotations,
    classifier_of,
    plan,
    usable_moments,
)


@dataclass(frozen=True)
class SetResult:
    """The numbers of a set.

    Attributes:
        metrics: metrics by name, from :func:`megatron_cca.lab.evaluation.fidelity.fidelity`.
        left_out: metric -> why it was not computed.
        accuracy: class accuracy, if there are labels and a classifier.
        clip_scores: float32 ``[N]``, if there are prompts and a CLIP.
        clip_cut: the number of prompts that the CLIP reads only in part.
    """

    name: str
    images: ImageSet
    metrics: dict[str, float]
    left_out: dict[str, str]
    accuracy: ClassAccuracy | None = None
    clip_scores: np.ndarray | None = None
    clip_cut: Cut | None = None


@dataclass(frozen=True)
class Evaluation:
    """All results with their settings.

    ``extractor_origin`` names the source of the extractor's weights.
    """

    settings: EvaluationSettings
    reference: ImageSet
    extractor_origin: dict[str, str]
    sets: list[SetResult]


def evaluate(settings: EvaluationSettings, device: torch.device) -> Evaluation:
    """Read the images, decide what can be computed, and compute it.

    Progress bars go to standard error.

    Raises:
        UserError: images that cannot be read; too few images for a metric that was asked for by name; no labels for a
            classifier or no prompts for CLIP; nothing that can be computed.
    """
    sets = {name: _read(SAMPLES, path) for name, path in settings.samples.items()}
    reference = _read(REFERENCE, settings.reference)
    check_annotations(settings, sets)
    extractor = None
    if settings.metrics != () and settings.extractor not in WIDTHS:
        # The outputs of a user's network show only when it runs.
        extractor = _open(settings, device)
    known = WIDTHS.get(settings.extractor, {}) if extractor is None else widths(extractor, reference.images)
    plans = plan(settings, sets, reference, known)
    if extractor is None and any(one.metrics for one in plans.values()):
        extractor = _open(settings, device)
    # Open both before the long computation. Errors in them appear early.
    name_of_classifier = classifier_of(settings, sets)
    classifier = open_classifier(name_of_classifier) if name_of_classifier is not None else None
    scorer = ClipScorer(settings.clip, device, settings.numbers.batch_size) if settings.clip is not None else None
    metrics = _fidelities(settings, sets, reference, extractor, plans)
    accuracies = _accuracies(sets, classifier) if classifier is not None else {}
    cuts = _cuts(sets, scorer) if scorer is not None else {}
    scores = _clip_scores(sets, scorer) if scorer is not None else {}
    results = [
        SetResult(
            name, images, metrics[name], plans[name].left_out, accuracies.get(name), scores.get(name), cuts.get(name)
        )
        for name, images in sets.items()
    ]
    origin = extractor.origin if extractor is not None else {}
    return Evaluation(replace(settings, classifier=name_of_classifier), reference, origin, results)


def _read(option: str, path: str) -> ImageSet:
    with error_context(option):
        found = read_images(path)
    for notice in found.notices:
        print(f"{option} {path}: {notice}", file=sys.stderr)
    return found


def _cuts(sets: dict[str, ImageSet], scorer: ClipScorer) -> dict[str, Cut]:
    found = {name: scorer.cut(one.prompts) for name, one in sets.items() if one.prompts is not None}
    for name, cut in found.items():
        if (line := cut.line()) is not None:
            print(f"{name}: {line}", file=sys.stderr)
    return found


def _open(settings: EvaluationSettings, device: torch.device) -> Extractor:
    extractor = open_extractor(settings.extractor, settings.inception_weights).to(device)
    if settings.extractor == "inception" and not extractor.origin["sha256"].startswith(PUBLISHED_SHA256):
        print(
            f"{WEIGHTS}: the SHA-256 of {settings.inception_weights} does not begin with {PUBLISHED_SHA256}, as the "
            "published file's name says it does; do not compare these numbers with papers'",
            file=sys.stderr,
        )
    return extractor


def _fidelities(
    settings: EvaluationSettings,
    sets: dict[str, ImageSet],
    reference: ImageSet,
    extractor: Extractor | None,
    plans: dict[str, Plan],
) -> dict[str, dict[str, float]]:
    if extractor is None:
        return {name: {} for name in sets}
    # Imported late: the import of torch-fidelity takes seconds.
    from megatron_cca.lab.evaluation.fidelity import Reference, fidelity

    real = Reference(reference.images, extractor, usable_moments(settings, reference))
    found = {}
    for name, images in sets.items():
        total = len(images.images) + (0 if found else len(real))
        with _bar(f"features of {name}", total) as bar:
            numbers = replace(settings.numbers, metrics=plans[name].metrics)
            with error_context(f"{SAMPLES} {name}"):
                found[name] = fidelity(images.images, real, extractor, numbers, bar.update)
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
