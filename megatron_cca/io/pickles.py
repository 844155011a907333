"""Read pickles of plain data. No other pickles are read from files that somebody else may have written.

A pickle is a program. Lists of names decide what it may call. Anything else is refused before it is called.
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
# The first bytes of a file of torch before 1.6: its magic number, as a pickle. A zip archive begins differently.
_OLD_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_ONE_AT_A_TIME = threading.Lock()


class NotPlainError(ValueError):
    """A whole file that holds something else than plain data. The message says what."""


# Not pickle's version in C: there a few bytes can claim a table of any size, and the meaning of a name can be changed.
class PlainUnpickler(pickle._Unpickler):
    """An unpickler that calls what ``is_allowed`` names, and changes nothing that has a name."""

    dispatch = {  # noqa: RUF012 - pickle's own way
        code: step for code, step in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]
    }

    def __init__(self, content: Any, is_allowed: Callable[[str, str], bool]) -> None:
        super().__init__(content)
        self._is_allowed = is_allowed

    def find_class(self, module: str, name: str) -> Any:
        """Return what a name stands for, if it is allowed."""
        if not self._is_allowed(module, name):
            raise NotPlainError(f"it asks for {module}.{name}, which no plain data needs")
        return super().find_class(module, name)

    def load_build(self) -> None:
        """Set an object's state, unless the object has a name."""
        if callable(self.stack[-2]):
            raise NotPlainError("it changes what a name stands for")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build


def unpickled(content: bytes, is_allowed: Callable[[str, str], bool]) -> Any:
    """Return what a pickle holds.

    Args:
        content: foreign input.
        is_allowed: whether a name of a module may be called or referred to.

    Raises:
        Exception: of nearly any class. The file is damaged, or asks for a name that is not allowed. It was not called.
    """
    return PlainUnpickler(io.BytesIO(content), is_allowed).load()


def load_tensors(content: bytes | BinaryIO | Path, allowed: Sequence[tuple[Any, str]] = ()) -> Any:
    """Return what ``torch.save`` wrote: tensors, numbers, strings and containers.

    torch's own list of further names that may be called belongs to the process. Megatron-Core adds numpy's function
    that restores arrays to it. That function trusts its input: a forged data type makes it follow pointers. Only
    torch's tensors are accepted here.

    Args:
        content: foreign input: the bytes, a file open at their start, or a path. The tensors of a path are memory maps,
            except those that torch before 1.6 wrote.
        allowed: further objects that may be called, each with its name in the file.

    Raises:
        Exception: of nearly any class. The file is damaged, or asks for a name that is not allowed. It was not called.
    """
    import torch

    source = io.BytesIO(content) if isinstance(content, bytes) else content
    with source.open("rb") if isinstance(source, Path) else nullcontext(source) as file:
        _refuse_swollen(file)
        is_old = _is_old(file)
        if is_old:
            from megatron_cca.io.file_contents import refuse_swollen_storages

            refuse_swollen_storages(file)
    mapped = isinstance(source, Path) and not is_old
    try:
        with _only(allowed):
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        # A message without torch's advice to allow it.
        if asked := re.search(r"GLOBAL (\S+)", str(error)):
            raise NotPlainError(f"it asks for {asked[1]}, which no plain data needs") from None
        raise


@contextmanager
def _only(allowed: Sequence[tuple[Any, str]]) -> Iterator[None]:
    from torch._weights_only_unpickler import Unpickler
    from torch.serialization import add_safe_globals, clear_safe_globals, get_safe_globals

    unchecked = Unpickler.load

    def load(unpickler: Unpickler) -> Any:
        """Shorten the message. torch searches it, with a foreign name in it, in time quadratic in its length."""
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
    """Refuse a compressed archive, since torch unpacks it to whatever size it claims."""
    start = file.tell()
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            size = file.seek(0, io.SEEK_END) - start
            if sum(member.file_size for member in archive.infolist()) > size:
                raise NotPlainError("a compressed archive, which torch does not write")
    file.seek(start)


def _is_old(file: BinaryIO) -> bool:
    start = file.tell()
    beginning = file.read(len(_OLD_MAGIC))
    file.seek(start)
    return beginning == _OLD_MAGIC
