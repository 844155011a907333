"""The work of megatron-cca evaluate between its options and its report: it reads images and runs networks on them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

import numpy as np
import torch
from tqdm import tqdm

from megatron_cca.errors import UserError, error_context
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
from megatron_cca.lab.evaluation.clip import CLIP, ClipScorer, open_scorer
from megatron_cca.lab.evaluation.detectors import ColorNamer, Detector, geneval_of
from megatron_cca.lab.evaluation.extractors import PUBLISHED_SHA256, WEIGHTS, WIDTHS, Extractor, open_extractor, widths
from megatron_cca.lab.evaluation.geneval import GenevalResult
from megatron_cca.lab.evaluation.image_sets import ImageSet, read_images
from megatron_cca.lab.evaluation.judges import ensure_judge
from megatron_cca.lab.evaluation.model_scorers import TruncatedPrompts
from megatron_cca.lab.evaluation.rewards import Rewards, rewards_of, shared_scores
from megatron_cca.lab.evaluation.shares import ALONE, Share
from megatron_cca.lab.evaluation.statistics import SAVE, check_owner, check_statistics, save_statistics


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


def evaluate(settings: EvaluateOptions, device: torch.device, share: Share = ALONE) -> Evaluation | None:
    """Read the images, decide what can be computed, and compute it.

    Progress bars go to standard error.

    Args:
        settings: the inputs.
        device: of the networks.
        share: this process's part. All processes of a job call this together; the networks' work is shared out, and
            rank 0 computes the rest.

    Returns:
        All results on rank 0, None elsewhere.

    Raises:
        UserError: images that cannot be read; too few images for a metric that was asked for by name; no labels for a
            classifier or no prompts for CLIP; nothing that can be computed.
    """
    size = settings.numbers.batch_size
    sets = {name: _read(SAMPLES, path, share, size) for name, path in settings.sets.items()}
    reference = _read(REFERENCE, settings.reference, share, size)
    check_annotations(settings, sets)
    check_owner(reference, settings.reference, settings.network)
    if settings.judge is not None:
        if not share.rank:
            ensure_judge(settings.judge, reference.images, reference.labels)
        share.wait()
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
    scorer = ClipScorer(settings.clip, device, size) if settings.clip is not None else None
    scorers = {name: open_scorer(name, device) for name in settings.scorer}
    detector = Detector(settings.detector, device) if settings.detector is not None else None
    colors = ColorNamer(scorer) if scorer is not None else None
    _say_enlarged(sets, {settings.network: extractor and extractor.network, CLIP: scorer, **scorers})
    metrics = _fidelities(settings, sets, reference, extractor, chosen, share)
    cuts = _cuts(sets, scorer) if scorer is not None and not share.rank else {}
    scores = _clip_scores(sets, scorer, size, share) if scorer is not None else {}
    rewards = {name: rewards_of(name, one, scorers, size, share) for name, one in sets.items()}
    seen = {}
    if detector is not None:
        seen = {name: geneval_of(name, one, detector, colors, size, share) for name, one in sets.items()}
    if share.rank:
        return None
    accuracies = _accuracies(sets, classifier) if classifier is not None else {}
    results = [
        SetResult(
            name,
            images,
            metrics[name],
            chosen[name].left_out,
            accuracies.get(name),
            scores.get(name),
            cuts.get(name),
            rewards[name],
            seen.get(name),
        )
        for name, images in sets.items()
    ]
    origin = extractor.origin if extractor is not None else {}
    settings = replace(settings, classifier=name_of_classifier)
    return Evaluation(settings, reference, origin, results, None if detector is None else detector.origin)


def _read(option: str, path: str, share: Share, batch_size: int) -> ImageSet:
    with error_context(option):
        # Rank 0 draws the sheets and asks the classifier.
        found = read_images(path, partial(share.rows, batch=batch_size) if share.rank else None)
    for notice in found.notices:
        print(f"{option} {path}: {notice}", file=sys.stderr)
    return found


def _say_enlarged(sets: dict[str, ImageSet], judges: Mapping[str, object]) -> None:
    """Say on standard error which published models see a set's images enlarged: they were not made for small ones."""
    sides = {name.partition(":")[0]: getattr(judge, "side", 0) for name, judge in judges.items()}
    for name, one in sets.items():
        height, width = one.images.shape[1:3]
        by = [f"{judge} to {side}" for judge, side in sides.items() if 2 * min(height, width) < side]
        if by:
            print(f"{name}: its images of {height} x {width} pixels are enlarged ({', '.join(by)})", file=sys.stderr)


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
    share: Share,
) -> dict[str, dict[str, float]]:
    if extractor is None:
        return {name: {} for name in sets}
    # Imported late: the import of torch-fidelity takes seconds.
    from megatron_cca.lab.evaluation.fidelity import ReferenceImages, fidelity

    real = ReferenceImages(reference.images, extractor, usable_moments(settings.network, reference))
    found = {}
    for name, images in sets.items():
        total = len(images.images) + (0 if found else len(real))
        with _bar(f"features of {name}", total) as bar:
            numbers = replace(settings.numbers, metrics=chosen[name].metrics)
            with error_context(f"{SAMPLES} {name}"):
                found[name] = fidelity(images.images, real, extractor, numbers, bar.update, share)
    if settings.save_statistics is not None and not share.rank:
        parts = {PART_OF[name] for one in chosen.values() for name in one.metrics if name in MOMENT_METRICS}
        moments = {part: tuple(real.moments(part).values()) for part in parts}
        save_statistics(settings.save_statistics, moments, extractor, reference.images)
    return found


def _accuracies(sets: dict[str, ImageSet], classifier: Classifier) -> dict[str, ClassAccuracy]:
    return {
        name: class_accuracy(one.images, one.labels, classifier) for name, one in sets.items() if one.labels is not None
    }


def _clip_scores(sets: dict[str, ImageSet], scorer: ClipScorer, size: int, share: Share) -> dict[str, np.ndarray]:
    found = {}
    for name, one in sets.items():
        if one.prompts is not None:
            with _bar(f"CLIP scores of {name}", len(one.images)) as bar:
                found[name] = shared_scores(scorer, one, size, share, bar.update)
    return found


def _bar(description: str, total: int) -> tqdm:
    return tqdm(total=total, unit="image", desc=description, disable=None)
