"""Random access to a file of JSON lines of any size. Only the offsets of lines are in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_cca.data.sources.foreign_text import parsed_object, printable
from megatron_cca.data.sources.source_protocol import Unreadable
from megatron_cca.errors import UserError
from megatron_cca.io.external_files import BOM, KIND_BYTES, kind_of

_CHUNK = 1 << 24
_MAX_LINE_BYTES = 1 << 26
_NEWLINE = 10
_IS_SPACE = np.isin(np.arange(256), list(b" \t\r\n\v\f"))
_LOOKED_AT = 100
_ARRAY = "one JSON array"
_WANTED = "write one JSON object a line, in UTF-8"


class JsonLines:
    """The lines of a file that are not blank.

    Attributes:
        digest: sha256 of the file.

    Raises:
        UserError: a file that cannot be read, is of another kind, or has no lines.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with path.open("rb") as file:
                kind = kind_of(file.read(KIND_BYTES))
                if kind is None:
                    self._offsets, self._lines, self.digest = _scanned(file)
                    kind = self._other_kind(file)
        except OSError as error:
            raise UserError(f"{printable(str(path))}: {error.strerror}") from None
        if kind is not None:
            raise UserError(f"{printable(str(path))} holds no records: it is {kind}; {_WANTED}")
        if not len(self._lines):
            raise UserError(f"{printable(str(path))} holds no records; {_WANTED}")

    def _other_kind(self, file: BinaryIO) -> str | None:
        """Return the kind of the file if none of its first lines begins as a JSON object does."""
        first = None
        for line in self._lines[:_LOOKED_AT].tolist():
            file.seek(int(self._offsets[line]))
            start = file.read(min(KIND_BYTES, int(self._offsets[line + 1] - self._offsets[line])))
            start = start.removeprefix(BOM).strip()
            if start.startswith(b"{"):
                return None
            if first is None and start.startswith(b"[") and not _is_json(start):
                return _ARRAY
            first = start if first is None else first
        if first is None:
            return None
        if first.startswith(b"["):
            return _ARRAY
        return f"no JSON, its first line is {printable(first.decode(errors='replace'))[:80]!r}"

    def __len__(self) -> int:
        return len(self._lines)

    def label(self, index: int) -> str:
        """Return the name of a line such as "captions.jsonl:17", counted from 1."""
        return f"{printable(self._path.name)}:{self._lines[index] + 1}"

    def object(self, index: int) -> dict[str, Any]:
        """Return the JSON object of a line.

        Raises:
            Unreadable: the line holds no object. The name is that of :meth:`label`.
        """
        try:
            with self._path.open("rb") as file:
                return self._parsed(file, index)
        except OSError as error:
            raise Unreadable(self.label(index), f"the file cannot be read: {error.strerror}") from None

    def objects(self) -> Iterator[dict[str, Any]]:
        """Yield the JSON objects of all lines in order. It is empty for a line that holds none."""
        with self._path.open("rb") as file:
            for index in range(len(self)):
                try:
                    yield self._parsed(file, index)
                except Unreadable:
                    yield {}

    def _parsed(self, file: BinaryIO, index: int) -> dict[str, Any]:
        line, name = self._lines[index], self.label(index)
        start, end = int(self._offsets[line]), int(self._offsets[line + 1])
        if end - start > _MAX_LINE_BYTES:
            raise Unreadable(name, f"the line has {end - start} bytes, at most {_MAX_LINE_BYTES} are read")
        file.seek(start)
        return parsed_object(file.read(end - start), "the line", name)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _scanned(file: BinaryIO) -> tuple[np.ndarray, np.ndarray, str]:
    """Return where lines begin, which lines are not blank, and the sha256 of the file.

    The first array is int64 ``[lines + 1]``, with the end of the last line.
    """
    file.seek(0)
    # A byte order mark does not count as contents of a line.
    mark = len(BOM) if file.read(len(BOM)) == BOM else 0
    file.seek(0)
    digest, position, is_begun = hashlib.sha256(), 0, False
    starts, filled = [np.zeros(1, dtype=np.int64)], []
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
        content = np.frombuffer(chunk, dtype=np.uint8)
        breaks = np.flatnonzero(content == _NEWLINE)
        has_ink = ~_IS_SPACE[content]
        has_ink[: max(0, mark - position)] = False
        # Each break ends a line. The line after the last break continues in the next chunk.
        found = np.logical_or.reduceat(np.append(has_ink, False), np.concatenate([[0], breaks + 1]))
        found[0] |= is_begun
        filled.append(found[:-1])
        is_begun = found[-1]
        starts.append(breaks + position + 1)
        position += len(chunk)
    lines = np.flatnonzero(np.concatenate([*filled, [is_begun]]))
    return np.concatenate([*starts, np.array([position])]), lines, digest.hexdigest()
