"""Read the output of LlamaGen's own extraction (``autoregressive/train/extract_codes_c2i.py``): numbered codes, labels.

NAME_codes/0.npy 1.npy ...    [1, V, H * W], V crops or mirror images of one picture; or [1, H * W]
NAME_labels/0.npy 1.npy ...   [1], the number of the picture's class

LlamaGen's training reads a second extraction, FOLDER_105 beside FOLDER, with probability 1/2 (``dataset/imagenet.py``).
If a folder holds two such folders, the variants of both are joined. With equal numbers of variants this is the same.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_cca.data.sources.external_text import printable
from megatron_cca.data.sources.folders import (
    Root,
    UnreadFiles,
    is_folder,
    names_in,
    outside_hint,
    read_below,
    real_folder,
)
from megatron_cca.data.sources.source_protocol import Record, Source, SourceOptions, Unreadable, checked_index
from megatron_cca.errors import UserError
from megatron_cca.io.file_contents import array_in

_CODES, _LABELS, _SECOND = "_codes", "_labels", "_105"
# The factor of the authors' VQ-16.
_PIXELS_PER_CODE = 16
# Far more than any image has: 10 crops of 128 x 128 codes in int64 are 1.3 MB.
_MAX_BYTES = 1 << 24
_MAX_LABEL = 1 << 31
# The codes of so many images count for the fingerprint.
_IMAGES_IN_FINGERPRINT = 1024


def recognises(path: Path, options: SourceOptions) -> bool:
    """Return whether a folder holds NAME_codes beside NAME_labels, or two folders that do."""
    return is_folder(path) and bool(_extractions(path))


def open_llamagen(path: Path, options: SourceOptions) -> Source:
    """Open the source in a folder.

    Raises:
        UserError: no pair of folders or several, missing files, or unequal numbers of labels and codes.
    """
    extractions = _extractions(path) if is_folder(path) else []
    if not extractions:
        raise UserError(
            f"{printable(str(path))} holds no NAME{_CODES} beside NAME{_LABELS}, such as imagenet384{_CODES}"
        )
    if len(extractions) > 1 and not _are_first_and_second(extractions):
        names = ", ".join(printable(pair.codes) for pair in extractions)
        raise UserError(f"{printable(str(path))} holds several extractions ({names}); give a folder that holds one")
    return CodeFolders(real_folder(path, options.allow_outside), extractions)


class CodeFolders:
    """Codes and labels by number, from one extraction or two.

    Raises:
        UserError: missing files, or unequal numbers of labels and codes.
    """

    def __init__(self, root: Root, pairs: list[_Pair]) -> None:
        self._root, self._pairs = root, pairs
        counts = {folder: _count(root, folder) for pair in pairs for folder in (pair.codes, pair.labels)}
        if len(set(counts.values())) > 1:
            found = ", ".join(f"{printable(folder)} {count}" for folder, count in counts.items())
            raise UserError(
                f"{printable(str(root))}: codes and labels are not of as many images: {found}; extract them again"
            )
        self._count = counts[pairs[0].codes]

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Record:
        index = checked_index(index, len(self))
        name = f"{self._pairs[0].codes}/{index}.npy"
        labels = [self._label(pair, index, name) for pair in self._pairs]
        if len(set(labels)) > 1:
            raise Unreadable(name, f"its label is {labels[0]} in one extraction and {labels[1]} in the other")
        variants = [self._codes(pair, index, name) for pair in self._pairs]
        if variants[0].shape[1:] != variants[-1].shape[1:]:
            raise Unreadable(name, "the two extractions have images of different sizes")
        codes = np.concatenate(variants)
        return Record(name, None, None, (), codes, labels[0], _PIXELS_PER_CODE)

    def notices(self) -> list[str]:
        """See :class:`Source`. Lists the folders."""
        read = {folder for pair in self._pairs for folder in (pair.codes, pair.labels)}
        places = sorted({folder.rpartition("/")[0] for folder in read})
        lines = []
        for place in places:
            prefix = f"{place}/" if place else ""
            alone = [
                f"{prefix}{name}"
                for name in names_in(self._root / place)
                if name.endswith((_CODES, _LABELS)) and f"{prefix}{name}" not in read
            ]
            if alone:
                lines.append(f"{printable(alone[0])} has no partner ({_CODES} and {_LABELS}) and is not read")
        unread = UnreadFiles()
        for folder in sorted(read):
            for name in names_in(self._root / folder):
                if not _is_numbered(name):
                    unread.add(f"{folder}/{name}")
        return lines + ([line] if (line := unread.line()) else [])

    def fingerprint(self) -> str:
        """See :class:`Source`.

        It covers the number of images, and the codes and labels of 1,024 from all over the list.
        """
        digest = hashlib.sha256(repr((self._count, self._pairs)).encode())
        for index in np.unique(np.linspace(0, self._count - 1, _IMAGES_IN_FINGERPRINT).astype(int)).tolist():
            for pair in self._pairs:
                for folder in (pair.codes, pair.labels):
                    try:
                        digest.update(read_below(self._root, f"{folder}/{index}.npy", "", _MAX_BYTES))
                    except Unreadable as error:
                        digest.update(str(error).encode())
        return digest.hexdigest()[:16]

    def _label(self, pair: _Pair, index: int, name: str) -> int:
        found = self._array(f"{pair.labels}/{index}.npy", name)
        if found.size != 1 or not 0 <= int(found.reshape(-1)[0]) < _MAX_LABEL:
            raise Unreadable(
                name, f"{pair.labels}/{index}.npy holds {list(found.shape)} numbers, not one label of 0 or more"
            )
        return int(found.reshape(-1)[0])

    def _codes(self, pair: _Pair, index: int, name: str) -> np.ndarray:
        """Return the codes of an image, int64 ``[V, 1, H, W]``."""
        found = self._array(f"{pair.codes}/{index}.npy", name)
        side = math.isqrt(found.shape[-1]) if found.ndim else 0
        if found.ndim not in (2, 3) or found.shape[0] != 1 or not found.size or side**2 != found.shape[-1]:
            raise Unreadable(name, f"has the shape {list(found.shape)}, not [1, variants, codes of a square image]")
        if found.min() < 0 or found.max() > np.iinfo(np.int64).max:
            raise Unreadable(name, "has codes that are negative or too large")
        return np.ascontiguousarray(found.reshape(-1, 1, side, side), dtype=np.int64)

    def _array(self, reference: str, name: str) -> np.ndarray:
        try:
            found = array_in(read_below(self._root, reference, name, _MAX_BYTES))
        except UserError as error:
            raise Unreadable(name, f"{printable(reference)} {error}") from None
        if found.dtype.kind not in "iu":
            raise Unreadable(name, f"{printable(reference)} holds {found.dtype} numbers, not whole ones")
        return found


@dataclass(frozen=True)
class _Pair:
    """Two folders of one extraction, relative to the source's."""

    codes: str
    labels: str


def _extractions(path: Path) -> list[_Pair]:
    own = _pairs(path, "")
    if own:
        return own
    names = set(names_in(path))
    twins = sorted(name for name in names if f"{name}{_SECOND}" in names)
    folders = [folder for name in twins for folder in (name, f"{name}{_SECOND}") if is_folder(path / folder)]
    return [pair for folder in folders for pair in _pairs(path / folder, f"{folder}/")]


def _pairs(folder: Path, prefix: str) -> list[_Pair]:
    names = set(names_in(folder))
    stems = sorted(name.removesuffix(_CODES) for name in names if name.endswith(_CODES))
    return [
        _Pair(f"{prefix}{stem}{_CODES}", f"{prefix}{stem}{_LABELS}")
        for stem in stems
        if f"{stem}{_LABELS}" in names
        and is_folder(folder / f"{stem}{_CODES}")
        and is_folder(folder / f"{stem}{_LABELS}")
    ]


def _are_first_and_second(pairs: list[_Pair]) -> bool:
    folders = [pair.codes.rpartition("/")[0] for pair in pairs]
    return len(folders) == 2 and all(folders) and f"{folders[0]}{_SECOND}" == folders[1]


def _count(root: Root, folder: str) -> int:
    """Return how many files 0.npy, 1.npy, ... a folder holds. None may be missing."""
    shown = printable(str(root / folder))
    if not root.holds(folder):
        raise UserError(f"{shown} leaves the folder by a symbolic link; {outside_hint([str(root / folder)])}")
    try:
        with os.scandir(root / folder) as entries:
            found = np.array([int(entry.name[:-4]) for entry in entries if _is_numbered(entry.name)], dtype=np.int64)
    except OSError as error:
        raise UserError(f"{shown}: {error.strerror}; give a folder that may be read") from None
    if not len(found):
        raise UserError(f"{shown} holds no 0.npy; give the folder that the extraction wrote")
    found.sort()
    places = np.arange(len(found))
    if (found != places).any():
        raise UserError(
            f"{shown}: {int((found != places).argmax())}.npy is missing, but there is {found[-1]}.npy; extract it again"
        )
    return len(found)


def _is_numbered(name: str) -> bool:
    # Without leading zeros, so that no two names have one number.
    return re.fullmatch(r"(0|[1-9][0-9]{0,11})\.npy", name) is not None
