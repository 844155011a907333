"""The interface of a source of images and captions, whatever its layout on disk is, and why it skips records."""

from __future__ import annotations

import json
import operator
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Protocol

import numpy as np

from megatron_cca.io.options import Folder, Option, options

_NAMES_AND_NUMBERS = re.compile(r"\S*[\d/]\S*|\S+\.[A-Za-z]{2,5}\b")
_SHOWN = 4


@dataclass(frozen=True)
class Record:
    """One image (or clip) and its caption.

    Attributes:
        name: unique within the source, stable and printable. For messages.
        caption: valid Unicode, not empty, without surrounding whitespace. None where there is none.
        condition: records with equal strings have the same condition. None means that the caption is the condition.
        frames: encoded image files (JPEG, PNG, WebP, ...), one for a still image, several for a clip. Empty where
            ``codes`` is given. They may be damaged.
        codes: int64 ``[1, H, W]``, not negative, of an image that is already tokenised. ``[V, 1, H, W]`` for V
            variants.
        label: the number of its class, from 0. None where there is none.
        pixels_per_code: along a side, for codes. None where the source does not know it.
    """

    name: str
    caption: str | None
    condition: str | None
    frames: tuple[bytes, ...]
    codes: np.ndarray | None = None
    label: int | None = None
    pixels_per_code: int | None = None


class Unreadable(Exception):
    """An error in one record, which cannot be read. The rest of the source can.

    Attributes:
        name: the record's name.
        reason: what is wrong, one line.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class NoPair(Unreadable):
    """A record that is in order, and none of whose images is known to be better than another."""


@dataclass(frozen=True)
class Comparison:
    """Several images for one caption, of which some are better than others.

    Attributes:
        name, caption, label: as of a :class:`Record`.
        images: the different ones, each with the same caption and label. One that cannot be read does not spoil the
            others.
        pairs: the better image and the worse one, by their places in ``images``. At least one.
    """

    name: str
    caption: str | None
    label: int | None
    images: tuple[Record | Unreadable, ...]
    pairs: tuple[tuple[int, int], ...]


class Source(Protocol):
    """Records in an order that is the same on every machine."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record | Comparison:
        """Read one record.

        Args:
            index: from 0. Negative ones count from the end, as in a list.

        Raises:
            Unreadable: this record cannot be read.
            IndexError: there is no such record.
        """

    def notices(self) -> list[str]:
        """Return what is there and not read, or may be read in another way than expected, one line each.

        This may walk through all files. It changes nothing.
        """

    def fingerprint(self) -> str:
        """Return a short hash that changes with the list of records and with their captions."""


class SomeRecords:
    """So many records of a source, at equal distances and in its order, as a source.

    Attributes:
        whole: the source.
        num_classes: the source's; None if it has none.
    """

    def __init__(self, whole: Source, count: int) -> None:
        assert count <= len(whole)
        self.whole, self._count = whole, count
        self.num_classes: int | None = getattr(whole, "num_classes", None)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Record | Comparison:
        """Read one record, see :class:`Source`."""
        return self.whole[checked_index(index, self._count) * len(self.whole) // self._count]

    def notices(self) -> list[str]:
        """Return those of the whole source, and how many of its records are taken."""
        return [*self.whole.notices(), f"{self._count} of {len(self.whole)} records are taken (--limit)"]

    def fingerprint(self) -> str:
        """See :class:`Source`."""
        return f"{self.whole.fingerprint()}-{self._count}"


@options
class SourceOptions:
    """What a user may say about a source; None is the layout's default."""

    caption_field: Annotated[str, Option(metavar="NAME")] | None = None
    """JSON key or column of the caption; JourneyDB's is prompt"""
    image_field: Annotated[str, Option(metavar="NAME")] | None = None
    """column of the image, in datasets"""
    split: Annotated[str, Option(metavar="NAME")] | None = None
    """part of a data set that has several (default train)"""
    caption_of_list: Annotated[str, Option(choices=("first", "random"))] | None = None
    """of an image with a list of captions take the first, or one by chance, the same in every run"""
    allow_outside: tuple[Folder, ...] | None = None
    """a folder outside --source where images may lie that links or lists of --source name; may be repeated (default:
    what leads out of --source is not read)"""


def checked_index(index: int, size: int) -> int:
    """Return ``index`` counted from 0.

    Raises:
        IndexError: there is no such record.
    """
    found = operator.index(index)
    if not -size <= found < size:
        raise IndexError(f"record {found} of {size}")
    return found % size


class SkipReasons:
    """A counter of reasons. Reasons that differ only in names and numbers are one, of which the first is shown."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._shown: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._counts)

    def add(self, reason: str) -> None:
        """Count one reason."""
        kind = _NAMES_AND_NUMBERS.sub("", reason)
        self._counts[kind] += 1
        self._shown.setdefault(kind, reason)

    def line(self) -> str:
        """Return "9: it has no caption; 2 such as: a.png is missing". The most frequent reason comes first."""
        kinds = self._counts.most_common(_SHOWN)
        parts = [
            f"{count}{' such as' if kind != self._shown[kind] and count > 1 else ''}: {self._shown[kind]}"
            for kind, count in kinds
        ]
        left = sum(self._counts.values()) - sum(count for _, count in kinds)
        return "; ".join([*parts, *([f"{left} for other reasons"] if left else [])])


def read_skip_reasons(files: Iterable[Path]) -> SkipReasons:
    """Return the reasons in files of skipped records, such as a shard folder's.

    Raises:
        ValueError, KeyError, TypeError, RecursionError: a line that holds something else.
    """
    found = SkipReasons()
    for file in files:
        with file.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                found.add(str(json.loads(line)["reason"]))
    return found
