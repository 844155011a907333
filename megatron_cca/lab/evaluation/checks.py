"""The checks of an evaluation before its networks run, and the metrics that the images and the extractor allow."""

from __future__ import annotations

import sys
from typing import NamedTuple

import numpy as np

from megatron_cca.errors import UserError, error_context
from megatron_cca.generation.decode_loop import SCORER
from megatron_cca.lab.evaluation import DIGITS, METRICS, TITLES, WORDS, Counts, EvaluateOptions, Obstacle, obstacle
from megatron_cca.lab.evaluation.classifiers import CLASSIFIER, DIGIT_SIZE, check_classifier
from megatron_cca.lab.evaluation.clip import CLIP, check_clip, check_scorer
from megatron_cca.lab.evaluation.detectors import check_detector
from megatron_cca.lab.evaluation.extractors import EXTRACTOR, check_extractor
from megatron_cca.lab.evaluation.geneval import DETECTOR, check_prompts
from megatron_cca.lab.evaluation.image_sets import ImageSet, check_path

SAMPLES, REFERENCE = "--samples", "--reference"


class ChosenMetrics(NamedTuple):
    """The metrics of a set that will be computed, and why others will not."""

    metrics: tuple[str, ...]
    left_out: dict[str, str]


def check(settings: EvaluateOptions) -> None:
    """Refuse invalid settings before an image is read or a network is loaded.

    Raises:
        UserError: names the option.
    """
    for option, path in ((SAMPLES, one) for one in settings.sets.values()):
        with error_context(option):
            check_path(path)
    with error_context(REFERENCE):
        check_path(settings.reference)
    if settings.metrics is None or settings.metrics:
        check_extractor(settings.network, settings.inception_weights)
    if settings.classifier is not None:
        check_classifier(settings.classifier)
    if settings.clip is not None:
        check_clip(settings.clip)
    for scorer in settings.scorer:
        check_scorer(scorer)
    if settings.detector is not None:
        check_detector(settings.detector)
    named = (settings.clip, settings.classifier, settings.judge, settings.detector, *settings.scorer)
    if settings.metrics == () and all(one is None for one in named):
        options = f"{CLASSIFIER}, {CLIP}, {DETECTOR} and {SCORER}"
        raise UserError(f"--metrics: names none, and none of {options} is given: nothing to do")


def check_annotations(settings: EvaluateOptions, sets: dict[str, ImageSet]) -> None:
    """Refuse a classifier if no set has labels, and CLIP, scorers and detector if no set has prompts.

    A detector wants GenEval's prompts.

    Raises:
        UserError: says where labels or prompts come from.
    """
    if settings.classifier is not None and all(images.labels is None for images in sets.values()):
        raise UserError(f"{CLASSIFIER}: no sample set has labels; they come from prompts.jsonl or an .npz with arr_1")
    readers = {CLIP: settings.clip, SCORER: settings.scorer, DETECTOR: settings.detector}
    reader = next((option for option, given in readers.items() if given), None)
    if reader is not None and all(images.prompts is None for images in sets.values()):
        raise UserError(
            f"{reader}: no sample set has prompts; they come from prompts.jsonl, as megatron-cca generate writes it"
        )
    if settings.detector is not None:
        for name, images in sets.items():
            if images.prompts is not None:
                size = images.images.shape[1:3]
                check_prompts(name, images.prompts, size, has_colors=settings.clip is not None)


def classifier_of(settings: EvaluateOptions, sets: dict[str, ImageSet]) -> str | None:
    """Return the requested classifier, the judge, or the digits' own.

    The last applies if the reference is the digits and the samples have labels.
    """
    labelled = [images for images in sets.values() if images.labels is not None]
    if settings.classifier is None and settings.judge is not None:
        return str(settings.judge) if labelled else None
    if settings.classifier is not None or settings.reference not in WORDS:
        return settings.classifier
    fit = labelled and all(images.images.shape[1:3] == DIGIT_SIZE for images in labelled)
    return DIGITS if fit else None


def choose_metrics(
    settings: EvaluateOptions, sets: dict[str, ImageSet], reference: ImageSet, widths: dict[str, int]
) -> dict[str, ChosenMetrics]:
    """Return the computable metrics of each set.

    It names the others on standard error.

    Args:
        settings: the inputs of the evaluation.
        sets, reference: the images.
        widths: widths of the parts that the extractor gives.

    Raises:
        UserError: a metric that was asked for by name and cannot be computed; nothing that can be computed; images that
            the digits' network does not accept.
    """
    if settings.metrics == ():
        return {name: ChosenMetrics((), {}) for name in sets}
    if settings.network == "digits":
        _check_digit_sizes(sets, reference)
    moments = frozenset(usable_moments(settings.network, reference))
    chosen = {}
    for name, images in sets.items():
        counts = Counts(len(images.images), len(reference.images), moments)
        chosen[name] = _chosen(settings, name, counts, widths)
    if not any(one.metrics for one in chosen.values()) and not (
        classifier_of(settings, sets) or settings.clip or settings.scorer or settings.detector
    ):
        raise UserError(next(reason for one in chosen.values() for reason in one.left_out.values()))
    real = reference.images.shape[1:3]
    for name, one in chosen.items():
        size = sets[name].images.shape[1:3]
        if size != real and len(reference.images):
            print(f"{name}: its images are {_by(size)} pixels, the reference's {_by(real)}", file=sys.stderr)
        for metric, reason in one.left_out.items():
            print(f"{name}: {TITLES[metric]} is left out ({reason})", file=sys.stderr)
    return chosen


def _chosen(settings: EvaluateOptions, name: str, counts: Counts, widths: dict[str, int]) -> ChosenMetrics:
    asked, left_out = settings.metrics or METRICS, {}
    for metric in asked:
        problem = obstacle(metric, counts, widths, settings.numbers)
        if problem is not None:
            left_out[metric] = _said(settings, name, problem)
            if settings.metrics is not None:
                raise UserError(left_out[metric])
    return ChosenMetrics(tuple(metric for metric in asked if metric not in left_out), left_out)


def usable_moments(network: str, reference: ImageSet) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return mean and covariance from the reference's file for the extractor of this name.

    Those of a file with images are always Inception's.
    """
    if reference.moments_of is not None:
        return dict(reference.moments_of.get(network.partition(":")[0], {}))
    usable = network == "inception" or reference.statistics is not None
    return dict(reference.moments or {}) if usable else {}


def _check_digit_sizes(sets: dict[str, ImageSet], reference: ImageSet) -> None:
    for option, images in (*((f"{SAMPLES} {name}", one) for name, one in sets.items()), (REFERENCE, reference)):
        size = images.images.shape[1:3]
        if len(images.images) and size != DIGIT_SIZE:
            raise UserError(
                f"{option}: {EXTRACTOR} digits takes images of 8 x 8 pixels, found {_by(size)}; give another "
                f"{EXTRACTOR}"
            )


def _by(size: tuple[int, ...]) -> str:
    return " x ".join(map(str, size))


def _said(settings: EvaluateOptions, name: str, problem: Obstacle) -> str:
    where = {
        "samples": f"{SAMPLES} {name}",
        "reference": f"{REFERENCE} {settings.reference}",
        "extractor": f"{EXTRACTOR} {settings.network}",
    }
    return f"{where[problem.side]}: {problem.reason}"
