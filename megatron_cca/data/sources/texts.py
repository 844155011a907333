"""Foreign text: captions, names and JSON that may hold anything."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from megatron_cca.data.sources.records import Unreadable
from megatron_cca.errors import one_line, shortened

# The keys and columns that hold a caption where the user names none.
CAPTION_FIELDS = ("caption", "text")
_MAX_SHOWN = 200
_BOM = b"\xef\xbb\xbf"


def printable(text: str) -> str:
    """The text on one line without control characters or lone surrogates, shortened in the middle if it is long."""
    return one_line(shortened(text, _MAX_SHOWN))


def unique_names(names: Iterable[str]) -> Iterator[str]:
    """The names, printable; one that came before gets "#2", "#3" and so on."""
    seen: set[str] = set()
    repeats: dict[str, int] = {}
    for raw in names:
        name = candidate = printable(raw)
        while candidate in seen:
            repeats[name] = repeats.get(name, 1) + 1
            candidate = f"{name}#{repeats[name]}"
        seen.add(candidate)
        yield candidate


class PackedStrings:
    """Many strings in little memory: their bytes and where each begins. Lone surrogates come through."""

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


def tidy(value: Any, what: str, name: str) -> str | None:
    """A caption or condition as it was written, without surrounding whitespace; None for null and for nothing.

    Args:
        value: foreign.
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


def decoded(content: bytes, what: str, name: str) -> str:
    """UTF-8 bytes as text, a byte order mark removed.

    Raises:
        Unreadable: not UTF-8.
    """
    try:
        return content.removeprefix(_BOM).decode()
    except UnicodeDecodeError:
        raise Unreadable(name, f"{what} is not UTF-8") from None


def parsed_object(content: bytes, what: str, name: str) -> dict[str, Any]:
    """A JSON object.

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


def caption_in(found: dict[str, Any], field: str | None, name: str) -> str | None:
    """The caption in a JSON object: that of ``field``, else the first of :data:`CAPTION_FIELDS` that is there.

    Raises:
        Unreadable: it is not a string.
    """
    fields = (field,) if field is not None else CAPTION_FIELDS
    value = next((found[key] for key in fields if found.get(key) is not None), None)
    return tidy(value, "caption", name)


def short_hash(*parts: object) -> str:
    """16 hexadecimal digits that change with any of the parts; these are told apart by their ``repr``."""
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()[:16]
