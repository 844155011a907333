"""Random access to a file of JSON lines of any size; in memory are only the offsets of its lines."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_cca.data.sources.records import Unreadable
from megatron_cca.data.sources.texts import parsed_object, printable
from megatron_cca.errors import UserError

_CHUNK = 1 << 24
_MAX_LINE_BYTES = 1 << 26
_NEWLINE = 10


class JsonLines:
    """The lines of a file that are not empty.

    Attributes:
        digest: sha256 of the file.

    Raises:
        UserError: a file that cannot be read, or without lines.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._offsets, self.digest = _scanned(path)
        except OSError as error:
            raise UserError(f"{printable(str(path))}: {error.strerror}") from None
        self._lines = np.flatnonzero(np.diff(self._offsets) > 1)
        if not len(self._lines):
            raise UserError(f"{printable(str(path))} holds no records; write one JSON object a line")

    def __len__(self) -> int:
        return len(self._lines)

    def label(self, index: int) -> str:
        """ "captions.jsonl:17", the line counted from 1."""
        return f"{printable(self._path.name)}:{self._lines[index] + 1}"

    def object(self, index: int) -> dict[str, Any]:
        """The JSON object of a line.

        Raises:
            Unreadable: the line holds none; named by :meth:`label`.
        """
        try:
            with self._path.open("rb") as file:
                return self._parsed(file, index)
        except OSError as error:
            raise Unreadable(self.label(index), f"the file cannot be read: {error.strerror}") from None

    def objects(self) -> Iterator[dict[str, Any]]:
        """The JSON objects of all lines in order; an empty one for a line that holds none."""
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


def _scanned(path: Path) -> tuple[np.ndarray, str]:
    """Where each line begins and the last one ends, int64 ``[lines + 1]``, and the file's sha256."""
    digest, position = hashlib.sha256(), 0
    starts = [np.zeros(1, dtype=np.int64)]
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            starts.append(np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == _NEWLINE) + position + 1)
            position += len(chunk)
    return np.concatenate([*starts, np.array([position])]), digest.hexdigest()
