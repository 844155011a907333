"""What a source of images and captions is, whatever lies on the disk."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Annotated, Protocol

import numpy as np

from megatron_cca.io.options import Folder, Option, options


@dataclass(frozen=True)
class Record:
    """One image (or clip) and its caption.

    Attributes:
        name: unique within the source, stable and printable; for messages.
        caption: None where there is none. Never empty, no surrounding whitespace, always valid Unicode.
        condition: records with equal strings have the same condition; None: the caption itself is the condition.
        frames: encoded image files (JPEG, PNG, WebP, ...), one for a still image, several for a clip; empty where
            ``codes`` is given. That they decode is not checked.
        codes: int64 ``[1, H, W]``, not negative: an image that is already tokenised; or ``[V, 1, H, W]`` for V variants
            of it.
        label: the number of its class, from 0; None where there is none.
        pixels_per_code: along a side; only of codes, and None where the source does not know it.
    """

    name: str
    caption: str | None
    condition: str | None
    frames: tuple[bytes, ...]
    codes: np.ndarray | None = None
    label: int | None = None
    pixels_per_code: int | None = None


class Unreadable(Exception):
    """One record cannot be read; the rest of the source can.

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


class Source(Protocol):
    """Records in an order that is the same on every machine."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Read one record.

        Args:
            index: from 0; negative ones count from the end, as in a list.

        Raises:
            Unreadable: this record cannot be read.
            IndexError: there is no such record.
        """

    def notices(self) -> list[str]:
        """What lies there and is not read, or is read otherwise than one may think; one line each.

        May walk through all files; nothing changes by it.
        """

    def fingerprint(self) -> str:
        """A short hash that changes with the list of records and with their captions."""


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
    """``index`` counted from 0.

    Raises:
        IndexError: not below ``size``.
    """
    found = operator.index(index)
    if not -size <= found < size:
        raise IndexError(f"record {found} of {size}")
    return found % size
