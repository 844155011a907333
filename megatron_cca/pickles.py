"""Pickles of plain data: the only ones that are read from files that somebody else may have written.

A pickle is a program. What it may call is decided here by lists of names; anything else is refused before it is called.
"""

from __future__ import annotations

import io
import pickle
import re
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO
from unittest.mock import patch

from megatron_cca.errors import shortened

_MAX_MESSAGE = 500
_ONE_AT_A_TIME = threading.Lock()


class NotPlainError(ValueError):
    """A file that is whole but holds something else than plain data; the message says what."""


# In Python, not in C: there a few bytes can claim a table of any size, and what a name stands for can be changed.
class _PlainUnpickler(pickle._Unpickler):
    dispatch = {  # noqa: RUF012 - pickle's own way
        code: step for code, step in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]
    }

    def __init__(self, content: bytes, is_allowed: Callable[[str, str], bool]) -> None:
        super().__init__(io.BytesIO(content))
        self._is_allowed = is_allowed

    def find_class(self, module: str, name: str) -> Any:
        if not self._is_allowed(module, name):
            raise NotPlainError(f"it asks for {module}.{name}, which no plain data needs")
        return super().find_class(module, name)

    def load_build(self) -> None:
        if callable(self.stack[-2]):
            raise NotPlainError("it changes what a name stands for")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build


def unpickled(content: bytes, is_allowed: Callable[[str, str], bool]) -> Any:
    """What a pickle holds.

    Args:
        content: foreign.
        is_allowed: whether a name of a module may be called or referred to.

    Raises:
        Exception: of nearly any class: damaged, or asking for something that is not allowed. Nothing else was called.
    """
    return _PlainUnpickler(content, is_allowed).load()


def load_tensors(content: bytes | BinaryIO | Path, allowed: Sequence[tuple[Any, str]] = ()) -> Any:
    """What ``torch.save`` wrote: tensors, numbers, strings and containers.

    torch's own list of what else may be called is the process's; Megatron-Core adds numpy's way of restoring arrays to
    it, which trusts its input (a forged data type makes it follow pointers). Only torch's tensors are taken here.

    Args:
        content: foreign; the bytes, a file open at their start, or a path: its tensors are then maps of the file, and
            what older torch wrote, which cannot be mapped, is refused.
        allowed: what else may be called, and the name by which the file calls it.

    Raises:
        Exception: of nearly any class: damaged, or asking for something that is not allowed. Nothing else was called.
    """
    import torch

    source = io.BytesIO(content) if isinstance(content, bytes) else content
    mapped = isinstance(source, Path)
    with source.open("rb") if mapped else nullcontext(source) as file:
        _refuse_swollen(file)
    try:
        with _only(allowed):
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        # Without torch's advice to allow it.
        if asked := re.search(r"GLOBAL (\S+)", str(error)):
            raise NotPlainError(f"it asks for {asked[1]}, which no plain data needs") from None
        raise


@contextmanager
def _only(allowed: Sequence[tuple[Any, str]]) -> Iterator[None]:
    from torch._weights_only_unpickler import Unpickler
    from torch.serialization import add_safe_globals, clear_safe_globals, get_safe_globals

    unchecked = Unpickler.load

    def load(unpickler: Unpickler) -> Any:
        """torch searches the message, in which a foreign name stands, in time that grows with its length squared."""
        try:
            return unchecked(unpickler)
        except pickle.UnpicklingError as error:
            raise pickle.UnpicklingError(shortened(str(error), _MAX_MESSAGE)) from None

    with _ONE_AT_A_TIME:
        others = get_safe_globals()
        clear_safe_globals()
        add_safe_globals(list(allowed))
        try:
            with patch.object(Unpickler, "load", load):
                yield
        finally:
            clear_safe_globals()
            add_safe_globals(others)


def _refuse_swollen(file: BinaryIO) -> None:
    """torch unpacks a compressed archive to whatever size it claims."""
    start = file.tell()
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            size = file.seek(0, io.SEEK_END) - start
            if sum(member.file_size for member in archive.infolist()) > size:
                raise NotPlainError("a compressed archive, which torch does not write")
    file.seek(start)
