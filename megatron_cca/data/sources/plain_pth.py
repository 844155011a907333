"""Reads a ``.pth`` of plain data: strings, numbers, containers, torch tensors and numpy's integer arrays.

``torch.load`` with ``weights_only`` runs nothing that is not on its list. numpy is not on it, and numpy's own way of
restoring arrays trusts its input (a forged data type makes it follow pointers), so that stand-ins take its place.
"""

from __future__ import annotations

import io
import math
import threading
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

_INTEGERS = frozenset(f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8))
_RECONSTRUCT = ("numpy._core.multiarray._reconstruct", "numpy.core.multiarray._reconstruct")
_ONE_AT_A_TIME = threading.Lock()


class NotPlainError(ValueError):
    """A ``.pth`` that is whole but holds something else than plain data; the message says what."""


class _Type:
    """In place of ``numpy.dtype``: integers only."""

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
    """In place of ``numpy.ndarray``; :attr:`values` is the array once its state is known."""

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
    """What a ``.pth`` file holds; numpy arrays come as integer arrays, wherever in a dictionary's values they stand.

    Raises:
        Exception: of nearly any class: damaged, or asking for something that is not plain data. Nothing was run.
    """
    import torch

    _refuse_swollen(content)
    allowed = [(_reconstruct, name) for name in _RECONSTRUCT]
    allowed += [(_Array, "numpy.ndarray"), (_Type, "numpy.dtype")]
    with _only_allowed(allowed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    if isinstance(found, dict):
        return {key: value.values if type(value) is _Array else value for key, value in found.items()}
    return found


@contextmanager
def _only_allowed(allowed: list[tuple[Any, str]]) -> Iterator[None]:
    """torch's list of what may be called is the process's own; Megatron-Core adds numpy's functions to it."""
    from torch.serialization import add_safe_globals, clear_safe_globals, get_safe_globals

    with _ONE_AT_A_TIME:
        others = get_safe_globals()
        clear_safe_globals()
        add_safe_globals(allowed)
        try:
            yield
        finally:
            clear_safe_globals()
            add_safe_globals(others)


def _refuse_swollen(content: bytes) -> None:
    """torch unpacks a compressed archive to whatever size it claims."""
    if not zipfile.is_zipfile(io.BytesIO(content)):
        return
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if sum(member.file_size for member in archive.infolist()) > len(content):
            raise NotPlainError("a compressed archive, which torch does not write")
