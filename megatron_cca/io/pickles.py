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
from typing import Any, BinaryIO, Protocol
from unittest.mock import patch

from megatron_cca.errors import shortened

_MAX_MESSAGE = 500
# What torch before 1.6 begins a file with: its magic number, a pickle of its own. A zip archive begins otherwise.
_OLD_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_MAX_LINE = 4096
_ITEM_BYTES = {"Double": 8, "Long": 8, "ComplexDouble": 16, "ComplexFloat": 8, "Float": 4, "Int": 4} | dict.fromkeys(
    ("Half", "BFloat16", "Short"), 2
)
_ONE_AT_A_TIME = threading.Lock()


class NotPlainError(ValueError):
    """A file that is whole but holds something else than plain data; the message says what."""


# In Python, not in C: there a few bytes can claim a table of any size, and what a name stands for can be changed.
class _PlainUnpickler(pickle._Unpickler):
    dispatch = {  # noqa: RUF012 - pickle's own way
        code: step for code, step in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]
    }

    def __init__(self, content: Readable, is_allowed: Callable[[str, str], bool]) -> None:
        super().__init__(content)
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
    return _PlainUnpickler(io.BytesIO(content), is_allowed).load()


def load_tensors(content: bytes | BinaryIO | Path, allowed: Sequence[tuple[Any, str]] = ()) -> Any:
    """What ``torch.save`` wrote: tensors, numbers, strings and containers.

    torch's own list of what else may be called is the process's; Megatron-Core adds numpy's way of restoring arrays to
    it, which trusts its input (a forged data type makes it follow pointers). Only torch's tensors are taken here.

    Args:
        content: foreign; the bytes, a file open at their start, or a path: its tensors are then maps of the file, but
            for what torch before 1.6 wrote, which is read into memory.
        allowed: what else may be called, and the name by which the file calls it.

    Raises:
        Exception: of nearly any class: damaged, or asking for something that is not allowed. Nothing else was called.
    """
    import torch

    source = io.BytesIO(content) if isinstance(content, bytes) else content
    with source.open("rb") if isinstance(source, Path) else nullcontext(source) as file:
        _refuse_swollen(file)
        mapped = not _is_old(file) and isinstance(source, Path)
        if not mapped:
            _refuse_swollen_storages(file)
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


def _is_old(file: BinaryIO) -> bool:
    start = file.tell()
    beginning = file.read(len(_OLD_MAGIC))
    file.seek(start)
    return beginning == _OLD_MAGIC


def _refuse_swollen_storages(file: BinaryIO) -> None:
    """torch before 1.6 says how large a tensor's storage is before it comes, and memory is taken for it at once."""
    if not _is_old(file):
        return
    start, rest = file.tell(), _Rest(file)
    unpickler = None
    # The magic number, the version, the machine's; then the data, in which storages are named.
    for _ in range(4):
        unpickler = _StorageClaims(rest)
        unpickler.load()
    claimed = sum(unpickler.claims.values())
    file.seek(start)
    if claimed > rest.size:
        raise EOFError(f"its tensors claim {claimed} bytes, more than its own {rest.size}")


class Readable(Protocol):
    """What an unpickler reads from."""

    def read(self, size: int) -> bytes:
        """At most so many bytes."""

    def readline(self) -> bytes:
        """Up to the end of the line."""


class _Rest:
    """What is left of a file, never asked for more than that."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, start = file, file.tell()
        self._end = file.seek(0, io.SEEK_END)
        self.size = self._end - start
        file.seek(start)

    def read(self, size: int) -> bytes:
        return self._file.read(min(size, self._end - self._file.tell()))

    def readline(self) -> bytes:
        return self._file.readline(_MAX_LINE)


class _Inert(dict):
    """In place of whatever a pickle asks for: nothing is called, and what it is given is let go."""

    def __init__(self, *_: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass


class _StorageClaims(_PlainUnpickler):
    """Reads a pickle for the storages that it names; ``claims`` are their bytes by key."""

    def __init__(self, content: Readable) -> None:
        super().__init__(content, lambda module, name: True)
        self.claims: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        return name.removesuffix("Storage") if name.endswith("Storage") else _Inert

    def persistent_load(self, pid: Any) -> None:
        kind, storage, key, _, count, _ = pid
        if kind not in ("storage", b"storage") or not isinstance(count, int) or not isinstance(storage, str):
            raise NotPlainError("it names something else than the storages of tensors")
        self.claims[str(key)] = max(0, count) * _ITEM_BYTES.get(storage, 1)
