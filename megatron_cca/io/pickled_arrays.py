"""Read numbers and numpy's arrays of them from pickles, as older evaluators keep their statistics.

Nothing of a pickle is called, not even numpy's own function that restores arrays: it trusts its input. What a pickle
asks for is replaced by stand-ins that keep their arguments. Arrays are made from them after the fact.
"""

from __future__ import annotations

import io
import math
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cca.errors import UserError
from megatron_cca.io.pickles import NotPlainError, PlainUnpickler

_PLAIN = (int, float, str, bytes, bool, type(None))
_DTYPE = re.compile(r"[<>=|]?[fiu][1248]")
_MODULES = ("numpy", "numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric", "numpy._core.numeric")


class _Type:
    """A stand-in for a data type."""

    def __init__(self, name: Any = None, *_: Any) -> None:
        self.name, self.order = name, "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]

    def real(self) -> np.dtype:
        if not isinstance(self.name, str) or not _DTYPE.fullmatch(self.name) or self.order not in ("<", ">", "=", "|"):
            raise NotPlainError(f"an array of something else than numbers ({str(self.name)[:20]!r})")
        return np.dtype(self.name).newbyteorder(self.order if self.order in "<>" else "=")


class _Array:
    """A stand-in for an array. It is made by a function of numpy without arguments that matter, and gets its state."""

    state: Any = None

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, is_fortran, content = state
        self.state = content, kind, shape, "F" if is_fortran else "C"

    def real(self) -> np.ndarray:
        if self.state is None:
            raise NotPlainError("an array without content")
        content, kind, shape, order = self.state
        if not isinstance(content, bytes) or not isinstance(kind, _Type) or order not in ("C", "F"):
            raise NotPlainError("an array of something else than numbers")
        if not isinstance(shape, tuple) or not all(type(size) is int and size >= 0 for size in shape):
            raise NotPlainError("an array of an impossible shape")
        dtype = kind.real()
        if math.prod(shape) * dtype.itemsize != len(content):
            raise NotPlainError("an array that is not as large as it says")
        return np.frombuffer(content, dtype).reshape(shape, order=order).astype(dtype.newbyteorder("="))


class _Buffered(_Array):
    """A stand-in for an array of pickle's protocol 5."""

    def __init__(self, *state: Any) -> None:
        self.state = state


class _Scalar(_Array):
    """A stand-in for one of numpy's numbers."""

    def __init__(self, kind: Any = None, content: Any = None) -> None:
        self.state = content, kind, (), "C"


class _Name:
    """A stand-in for a name that is only handed on. It cannot be called."""


def _encoded(text: Any = "", *_: Any) -> bytes:
    """Return bytes that protocols before 3 write as text, or as nothing."""
    return text.encode("latin1")


_STAND_INS = {
    "_reconstruct": _Array,
    "_frombuffer": _Buffered,
    "scalar": _Scalar,
    "dtype": _Type,
    "ndarray": _Name,
}


class _ArrayUnpickler(PlainUnpickler):
    dispatch = dict(PlainUnpickler.dispatch)  # noqa: RUF012 - pickle's own way

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), lambda module, name: False)
        self._most = len(content)

    def find_class(self, module: str, name: str) -> Any:
        if module in _MODULES and name in _STAND_INS:
            return _Name() if name == "ndarray" else _STAND_INS[name]
        if (module, name) in (("_codecs", "encode"), ("__builtin__", "bytes")):
            return _encoded
        raise NotPlainError(f"it asks for {module}.{name}, which no array of numbers needs")

    def load_bytearray8(self) -> None:
        """Keep bytes that can be changed as bytes that cannot, if the file has so many."""
        (size,) = struct.unpack("<Q", self.read(8))
        if size > self._most:
            raise NotPlainError(f"it claims {size} bytes, more than it has")
        self.append(self.read(size))

    dispatch[0x96] = load_bytearray8


def pickled_arrays(path: Path) -> dict[str, Any]:
    """Return the table in a pickle: numbers, texts, numpy's arrays of numbers, and tables of them by name.

    Args:
        path: foreign input.

    Raises:
        UserError: damaged, or anything else in it. Nothing was called. The message does not name the file.
    """
    try:
        return _table(_ArrayUnpickler(path.read_bytes()).load())
    except OSError:
        raise
    except Exception as error:  # pickle promises no closed set for damaged files
        reason = str(error) if isinstance(error, NotPlainError) else f"{type(error).__name__}: {error}"
        raise UserError(f"is no pickle of numbers and arrays alone ({reason[:120]})") from None


def _table(found: Any, depth: int = 0) -> dict[str, Any]:
    if not isinstance(found, dict) or depth > 2 or not all(isinstance(name, str) for name in found):
        raise NotPlainError("it holds no table with names")
    return {name: _value(value, depth) for name, value in found.items()}


def _value(value: Any, depth: int) -> Any:
    if isinstance(value, _Array):
        return value.real()
    if type(value) in _PLAIN:
        return value
    if isinstance(value, dict):
        return _table(value, depth + 1)
    raise NotPlainError(f"it holds a {type(value).__name__}")
