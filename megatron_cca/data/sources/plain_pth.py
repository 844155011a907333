"""Read a ``.pth`` of plain data: strings, numbers, containers, torch tensors and numpy's integer arrays.

``torch.load`` with ``weights_only`` calls nothing that is not on its list. numpy is not on it, and numpy's own function
that restores arrays trusts its input: a forged data type makes it follow pointers. Stand-ins therefore take its place.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np

from megatron_cca.io.pickles import NotPlainError, load_tensors

_INTEGERS = frozenset(f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8))
_RECONSTRUCT = ("numpy._core.multiarray._reconstruct", "numpy.core.multiarray._reconstruct")


class _Type:
    """A stand-in for ``numpy.dtype``, for integers only."""

    def __init__(self, code: str, *_: Any) -> None:
        if code not in _INTEGERS:
            raise NotPlainError(f"an array of type {code!r:.20} instead of integers")
        self.code = code
        self.order = "<"

    def __setstate__(self, state: tuple) -> None:
        order = state[1]
        if order not in ("<", ">", "|"):
            raise NotPlainError("an array of unknown byte order")
        self.order = order


class _Array:
    """A stand-in for ``numpy.ndarray``. :attr:`values` is the array once its state is known."""

    values: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, kind, is_fortran, content = state
        if type(kind) is not _Type or type(content) is not bytes or not all(type(size) is int for size in shape):
            raise NotPlainError("an array of another kind than numpy writes")
        flat = np.frombuffer(content, dtype=kind.order + kind.code)
        if min(shape, default=0) < 0 or math.prod(shape) != len(flat):
            raise NotPlainError("an array whose size is not that of its contents")
        self.values = flat.reshape(shape, order="F" if is_fortran else "C")


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def load_plain(content: bytes) -> Any:
    """Return what a ``.pth`` file holds. numpy arrays in a dictionary's values become integer arrays.

    Raises:
        Exception: of nearly any class. The file is damaged, or asks for something that is not plain data. Nothing was
            run.
    """
    allowed = [(_reconstruct, name) for name in _RECONSTRUCT]
    allowed += [(_Array, "numpy.ndarray"), (_Type, "numpy.dtype")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = load_tensors(content, allowed)
    if isinstance(found, dict):
        return {key: value.values if type(value) is _Array else value for key, value in found.items()}
    return found
