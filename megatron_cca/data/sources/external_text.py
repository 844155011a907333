"""Handle text that other programs wrote: captions, names, and files of JSON lines of any size."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_cca.data.sources.source_protocol import SourceOptions, Unreadable
from megatron_cca.errors import UserError, one_line, shortened
from megatron_cca.io.file_contents import BOM, KIND_BYTES, kind_of

# The keys and columns that hold a caption unless the user names one.
CAPTION_FIELDS = ("caption", "text")
# Which caption of a list is taken.
OF_LIST = ("first", "random")
OF_LIST_HINT = "choose one of each list with --caption-of-list first or random"
# The words in a folder's or file's name by which ``datasets`` recognises splits.
_SPLIT_WORDS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "dev", "val"},
    "test": {"test", "testing", "eval", "evaluation"},
}
_BETWEEN_WORDS = re.compile(r"[-._ 0-9]+")
# Characters of a text in a message.
_MAX_SHOWN = 200
# Bytes of a file of JSON lines that are searched for line breaks at a time.
_CHUNK = 1 << 24
_MAX_LINE_BYTES = 1 << 26
_NEWLINE = 10
_IS_SPACE = np.isin(np.arange(256), list(b" \t\r\n\v\f"))
# Of this many lines one must begin as a JSON object does.
_LINES_CHECKED = 100
_ARRAY = "one JSON array"
_WANTED = "write one JSON object a line, in UTF-8"


def printable(text: str) -> str:
    """Return the text on one line without control characters or lone surrogates.

    A long text is shortened in the middle.
    """
    return one_line(shortened(text, _MAX_SHOWN))


def unique_names(names: Iterable[str]) -> Iterator[str]:
    """Yield the names, printable. A repeated name gets "#2", "#3" and so on."""
    seen: set[str] = set()
    repeats: dict[str, int] = {}
    for raw in names:
        name = candidate = printable(raw)
        while candidate in seen:
            repeats[name] = repeats.get(name, 1) + 1
            candidate = f"{name}#{repeats[name]}"
        seen.add(candidate)
        yield candidate


def short_hash(*parts: object) -> str:
    """Return 16 hexadecimal digits that change with the ``repr`` of any of the parts."""
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def option_entry(option: str | None) -> tuple[str, ...]:
    """Return an option as a part of a source's fingerprint.

    It has no entry by default, so that fingerprints of earlier versions stay.
    """
    return () if option is None else (option,)


def split_of(name: str) -> str:
    """Return the split in a folder's or file's name: "train", "validation" or "test". It is "" where there is none."""
    words = set(_BETWEEN_WORDS.split(name))
    return next((split for split, known in _SPLIT_WORDS.items() if words & known), "")


def clean_text(value: Any, what: str, name: str) -> str | None:
    """Return a caption or condition without surrounding whitespace. None for null and for an empty text.

    Args:
        value: untrusted input.
        what: "caption" or "condition", for the message.
        name: the record's.

    Raises:
        Unreadable: not a string, or not valid Unicode.
    """
    if value is None:
        return None
    if not isinstance(value, str):
        raise Unreadable(name, f"{what} must be a string, found {_shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Unreadable(name, f"{what} is not valid Unicode") from None
    return value.strip() or None


def decoded(content: bytes, what: str, name: str) -> str:
    """Decode UTF-8 bytes to text, without a byte order mark.

    Raises:
        Unreadable: not UTF-8.
    """
    try:
        return content.removeprefix(BOM).decode()
    except UnicodeDecodeError:
        kind = kind_of(content[:KIND_BYTES])
        raise Unreadable(name, f"{what} is not UTF-8{f': it is {kind}' if kind else ''}") from None


def parsed_object(content: bytes, what: str, name: str) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        Unreadable: not UTF-8, not JSON, too deeply nested, or something else than an object.
    """
    text = decoded(content, what, name)
    try:
        found = json.loads(text)
    except ValueError:
        raise Unreadable(name, f"{what} is not valid JSON") from None
    except RecursionError:
        raise Unreadable(name, f"{what} is nested too deeply") from None
    if not isinstance(found, dict):
        raise Unreadable(name, f"{what} must hold a JSON object, found {_shown(found)}")
    return found


def caption_in(found: dict[str, Any], options: SourceOptions, name: str) -> str | None:
    """Return the caption in a JSON object: that of the wanted field, else the first existing of :data:`CAPTION_FIELDS`.

    Raises:
        Unreadable: the caption is neither a string nor a list that :func:`caption_of` accepts.
    """
    fields = (options.caption_field,) if options.caption_field is not None else CAPTION_FIELDS
    value = next((found[key] for key in fields if found.get(key) is not None), None)
    return caption_of(value, options.caption_of_list, name)


def caption_of(value: Any, of_list: str | None, name: str) -> str | None:
    """Return a caption, which may be one of a list.

    Args:
        value: untrusted input. Only captions of a list that hold text count.
        of_list: "first", or "random", which depends on the record's name. None accepts no list.
        name: the record's.

    Raises:
        Unreadable: a list where none is accepted, or what :func:`clean_text` refuses.
    """
    if not isinstance(value, list):
        return clean_text(value, "caption", name)
    if of_list is None:
        raise Unreadable(name, f"caption must be a string, found a list of {len(value)}; {OF_LIST_HINT}")
    texts = [text for one in value if (text := clean_text(one, "a caption of the list", name)) is not None]
    if not texts:
        return None
    place = 0 if of_list == OF_LIST[0] else int(short_hash(name), 16) % len(texts)
    return texts[place]


class PackedStrings:
    """Many strings in little memory: their bytes, and where each begins. Lone surrogates are kept."""

    def __init__(self, strings: Iterable[str]) -> None:
        blob, ends = bytearray(), [0]
        for string in strings:
            blob += string.encode("utf-8", "surrogatepass")
            ends.append(len(blob))
        self.blob = bytes(blob)
        self._ends = np.array(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        return self.blob[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogatepass")


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
                    self._offsets, self._lines, self.digest = _scan_lines(file)
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
        for line in self._lines[:_LINES_CHECKED].tolist():
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


def _shown(value: Any) -> str:
    names = {
        type(None): "null",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), type(value).__name__)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _scan_lines(file: BinaryIO) -> tuple[np.ndarray, np.ndarray, str]:
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
