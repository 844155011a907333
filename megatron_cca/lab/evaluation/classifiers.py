"""Class accuracy: the share of samples that show the requested class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_cca.errors import UserError
from megatron_cca.lab.evaluation.plugins import is_function_spec, load_function

CLASSIFIER = "--classifier"
Classifier = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class ClassAccuracy:
    """The share of images whose label a classifier finds.

    ``overall`` is over all images, ``per_class`` over those of each label.
    """

    overall: float
    per_class: dict[int, float]


def open_classifier(name: str) -> Classifier:
    """Open a classifier that maps images uint8 ``[N, H, W, 3]`` to classes int64 ``[N]``.

    Args:
        name: ``digits`` for the demo's SVM, which is trained here on the real training scans, or ``FILE.py:FUNCTION``
            for a user's function.

    Raises:
        UserError: another name, or a function that cannot be loaded.
    """
    check_classifier(name)
    return _digits if name == "digits" else load_function(name, CLASSIFIER)


def check_classifier(name: str) -> None:
    """Refuse a name that is no classifier.

    Nothing is loaded.

    Raises:
        UserError: names the possible classifiers.
    """
    if name != "digits" and not is_function_spec(name):
        raise UserError(f"{CLASSIFIER}: {name!r} is neither digits nor FILE.py:FUNCTION")


def _digits(images: np.ndarray) -> np.ndarray:
    from megatron_cca.lab.evaluation.digit_judges import check_size, standard_judges

    check_size(images.shape[1:3])
    return standard_judges().classify(images[..., 0])


def class_accuracy(images: np.ndarray, labels: np.ndarray, classifier: Classifier) -> ClassAccuracy:
    """Return how often the classifier's answer equals the label.

    Args:
        images: uint8 ``[N, H, W, 3]``, at least one.
        labels: int64 ``[N]``.
        classifier: a classifier from :func:`open_classifier`.

    Raises:
        UserError: the classifier does not return ``N`` integers.
    """
    guesses = np.asarray(classifier(images))
    if guesses.shape != labels.shape or not np.issubdtype(guesses.dtype, np.integer):
        raise UserError(
            f"{CLASSIFIER}: must answer {len(labels)} whole numbers for {len(labels)} images, found {guesses.dtype} "
            f"{list(guesses.shape)}"
        )
    right = guesses == labels
    return ClassAccuracy(
        float(right.mean()), {int(one): float(right[labels == one].mean()) for one in np.unique(labels)}
    )
