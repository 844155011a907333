"""Class accuracy: the share of samples in which a classifier sees the requested class.

The classifier is an SVM for the digits, or a function of the user. Here is also what runs such functions.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_cca.errors import UserError, error_context
from megatron_cca.io.paths import typed_path
from megatron_cca.lab.evaluation.judges import is_judge, open_judge

CLASSIFIER = "--classifier"
# Height and width of the digits' scans.
DIGIT_SIZE = (8, 8)

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
        name: ``digits`` for the demo's SVM, which is trained here on the real training scans, ``FILE.judge`` for a
            trained judge, or ``FILE.py:FUNCTION`` for a user's function.

    Raises:
        UserError: another name, or a function that cannot be loaded.
    """
    check_classifier(name)
    if is_judge(name):
        with error_context(CLASSIFIER):
            return open_judge(Path(typed_path(name))).classify
    return _classify_digits if name == "digits" else load_function(name, CLASSIFIER)


def check_classifier(name: str) -> None:
    """Refuse a name that is no classifier.

    Nothing is loaded.

    Raises:
        UserError: names the possible classifiers.
    """
    if name != "digits" and not is_judge(name) and not is_function_spec(name):
        raise UserError(f"{CLASSIFIER}: {name!r} is neither digits nor FILE.py:FUNCTION nor FILE.judge")


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


class DigitSvm:
    """A support vector machine that was trained on real scans of digits.

    Args:
        images: the scans, uint8 ``[N, 8, 8]``.
        labels: the digits, int64 ``[N]``.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        # Imported late: its import takes a second, and only the digits need it.
        from sklearn.svm import SVC

        self._svm = SVC(gamma=0.001, C=10.0).fit(_grey_levels(images), labels)

    def classify(self, images: np.ndarray) -> np.ndarray:
        """Return the digits that it sees in images uint8 ``[N, 8, 8]``, int64 ``[N]``."""
        return self._svm.predict(_grey_levels(images)).astype(np.int64)

    def accuracy(self, images: np.ndarray, labels: np.ndarray) -> float:
        """Return the share of images uint8 ``[N, 8, 8]`` in which it sees the requested digit."""
        return float(self._svm.score(_grey_levels(images), labels))


def check_digit_size(size: tuple[int, ...]) -> None:
    """Refuse images whose height and width differ from the scans'.

    Raises:
        UserError: names the size found.
    """
    if tuple(size) != DIGIT_SIZE:
        raise UserError(f"the digits' networks take images of 8 x 8 pixels, found {' x '.join(map(str, size))}")


def _grey_levels(images: np.ndarray) -> np.ndarray:
    """Return the SVM's inputs: grey levels 0 to 16, as in scikit-learn."""
    return images.reshape(len(images), -1) * (16 / 255)


@functools.cache
def _standard_svm() -> DigitSvm:
    """Return the SVM of the 1,437 training scans. Each process trains it once."""
    from megatron_cca.data.digits import load_scans

    train, _ = load_scans()
    return DigitSvm(train.images, train.labels)


def _classify_digits(images: np.ndarray) -> np.ndarray:
    check_digit_size(images.shape[1:3])
    return _standard_svm().classify(images[..., 0])


def is_function_spec(spec: str) -> bool:
    """Check whether a name has the form ``FILE.py:FUNCTION``."""
    file, separator, _ = spec.rpartition(":")
    return bool(separator) and file.endswith(".py")


def load_function(spec: str, option: str) -> Callable:
    """Run a Python file and return one of its functions.

    Args:
        spec: ``FILE.py:FUNCTION``. Each process runs the file once, as an import does.
        option: the option that names it, for messages.

    Returns:
        The function. Any exception of it becomes a :class:`UserError`.

    Raises:
        UserError: another form, no such file, a file that fails when it runs, or no such function in it.
    """
    if not is_function_spec(spec):
        raise UserError(f"{option}: {spec!r} is not of the form FILE.py:FUNCTION")
    name, _, function = spec.rpartition(":")
    with error_context(option):
        file = Path(typed_path(name))
    if not file.is_file():
        raise UserError(f"{option}: the file {file} does not exist")
    module = _run(file, option)
    if not hasattr(module, function):
        raise UserError(f"{option}: {file} defines no {function!r}")
    if not callable(getattr(module, function)):
        raise UserError(f"{option}: {function!r} in {file} is not a function")
    return _guarded(getattr(module, function), spec, option)


@contextmanager
def failures_said(spec: str, option: str) -> Iterator[None]:
    """Turn an exception of the user's code into one line, with its line number in the user's file.

    Raises:
        UserError: begins with ``option`` and ``spec``.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        file = Path(typed_path(spec.rpartition(":")[0])).resolve()
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        where = f" at line {lines[-1]}" if lines else ""
        reason = " ".join(str(error).split())
        raise UserError(f"{option}: {spec} failed{where}: {type(error).__name__}: {reason}") from None


def _guarded(function: Callable, spec: str, option: str) -> Callable:
    @functools.wraps(function)
    def called(*arguments):
        with failures_said(spec, option):
            return function(*arguments)

    return called


def _run(file: Path, option: str) -> object:
    path = file.resolve()
    # In sys.modules it has its own name. Dataclasses and pickle look for it there. It does not hide another module.
    name = f"_user_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if not isinstance(error, Exception):
            raise
        reason = " ".join(str(error).split())
        raise UserError(f"{option}: {file} cannot be run: {type(error).__name__}: {reason}") from None
    return module
