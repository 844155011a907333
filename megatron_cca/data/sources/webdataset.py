"""Read WebDataset: tars in which the members of a record have the same name up to the first dot."""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from megatron_cca.data.sources.external_text import (
    PackedStrings,
    caption_in,
    clean_text,
    decoded,
    parsed_object,
    printable,
    unique_names,
)
from megatron_cca.data.sources.folders import (
    MAX_IMAGE_BYTES,
    MAX_TEXT_BYTES,
    UnreadFiles,
    checked_file,
    is_file,
    is_folder,
    names_in,
    real_folder,
)
from megatron_cca.data.sources.source_protocol import Record, Source, SourceOptions, Unreadable, checked_index
from megatron_cca.errors import UserError
from megatron_cca.io.file_contents import kind_of_file

_BLOCK = tarfile.BLOCKSIZE
# What compressed files begin with.
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_IMAGES = ("jpg", "jpeg", "png", "webp")
_TEXTS = ("txt", "caption")
# The columns of the index. If a record has several images or texts, the first kind is used.
_KINDS = (*_IMAGES, "txt", "json", "cls", "caption")
_COLUMN = {kind: column for column, kind in enumerate(_KINDS)}
_PACKED = (".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
_DOTTED = "images with a second dot in their names, behind which webdataset ends a record's name"
# The offset of a member that a record does not have.
_ABSENT = -1
# How many records are searched for the field of captions.
_RECORDS_CHECKED = 100
# The number at the end of a tar's name.
_NUMBER = re.compile(r"[0-9]{1,12}$")


def recognises(path: Path, options: SourceOptions) -> bool:
    """Return whether a path is a tar, or a folder with tars."""
    names = [path.name] if is_file(path) else names_in(path)
    return any(name.lower().endswith((".tar", *_PACKED)) for name in names)


def open_webdataset(path: Path, options: SourceOptions) -> Source:
    """Open the source in a tar, or in the tars of a folder.

    Raises:
        UserError: no tars, a compressed, damaged or unsafe one, no tar with images, or a ``caption_field`` that no JSON
            has.
    """
    unread = UnreadFiles()
    if is_file(path):
        tars = [path]
    else:
        names = names_in(path)
        packed = [name for name in names if name.lower().endswith(_PACKED)]
        if packed:
            raise UserError(f"{path / packed[0]} is compressed, which allows no random access; decompress it")
        root = real_folder(path, options.allow_outside)
        tars = [checked_file(root, name, kinds=None) for name in names if _is_tar(name)]
        for name in names:
            if not _is_tar(name):
                unread.add(f"{name}/" if is_folder(path / name) else name)
        for name in names_in(path, hidden=True):
            unread.add(name)
    if not tars:
        raise UserError(f"{path} holds no .tar files")
    source = TarRecords(tars, options, unread)
    source.check_caption_field()
    return source


class TarRecords:
    """The records of some tars.

    Memory holds, for each record, its name, its tar, and the places of its members: int64 ``[N, kinds, 2]``, offset and
    size, -1 where there is no such member.
    """

    def __init__(self, tars: list[Path], options: SourceOptions, unread: UnreadFiles | None = None) -> None:
        self._tars, self._options = tars, options
        self._field = options.caption_field
        # Unread files beside the tars, and in them.
        self._unread, self._members = unread or UnreadFiles(), UnreadFiles()
        places: list[np.ndarray] = []
        self._names = PackedStrings(unique_names(self._read_index(places)))
        self._tar_ids = np.repeat(np.arange(len(tars), dtype=np.int32), [len(rows) for rows in places])
        self._places = np.concatenate(places)
        if not (self._places[:, : len(_IMAGES), 0] != _ABSENT).any():
            found = f"; {line}" if (line := self._members.line()) else ""
            raise UserError(f"{tars[0].parent} has no tar with images ({', '.join(_IMAGES)}){found}")

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Record:
        index = checked_index(index, len(self))
        name = self._names[index]
        image = next((found for kind in _IMAGES if (found := self._read(index, kind, MAX_IMAGE_BYTES))), None)
        if image is None:
            raise Unreadable(name, f"has no image ({', '.join(_IMAGES)}), or an empty one")
        return Record(name, *self._text(index), (image,))

    def fingerprint(self) -> str:
        """See :class:`Source`. Reads every text."""
        # Kinds and options that earlier versions did not have count only where they are used.
        kinds = [kind for kind in _KINDS if kind != "caption" or (self._places[:, _COLUMN[kind], 0] != _ABSENT).any()]
        sizes = self._places[:, : len(kinds), 1]
        asked = repr(self._field) + (self._options.caption_of_list or "")
        digest = hashlib.sha256(asked.encode() + self._names.blob + sizes.tobytes())
        for index in range(len(self)):
            for kind in kinds[len(_IMAGES) :]:
                try:
                    digest.update(self._read(index, kind, MAX_TEXT_BYTES) or b"")
                except Unreadable as error:
                    digest.update(str(error).encode())
        return digest.hexdigest()[:16]

    def notices(self) -> list[str]:
        """See :class:`Source`."""
        lines = [line] if (line := _gap(tar.name for tar in self._tars)) else []
        counts = np.bincount(self._tar_ids, minlength=len(self._tars))
        if empty := [tar.name for tar, count in zip(self._tars, counts, strict=True) if not count]:
            lines.append(f"{len(empty)} tars hold no records ({printable(empty[0])})")
        here = self._places[:, :, 0] != _ABSENT
        imageless = int((~here[:, : len(_IMAGES)].any(1)).sum())
        if imageless:
            lines.append(f"{imageless} of {len(self)} records have no image ({', '.join(_IMAGES)})")
        if several := int((here[:, : len(_IMAGES)].sum(1) > 1).sum()):
            lines.append(f"{several} records have several images, of which the first of {', '.join(_IMAGES)} is read")
        lines += [f"in the tars, {line}" for line in [self._members.line()] if line]
        return lines + [f"beside the tars, {line}" for line in [self._unread.line()] if line]

    def check_caption_field(self) -> None:
        """Check that the first records with JSON have the field.

        Raises:
            UserError: none of them has it.
        """
        if self._field is None:
            return
        rows = np.flatnonzero(self._places[:, _COLUMN["json"], 0] != _ABSENT)[:_RECORDS_CHECKED]
        if not any(self._field in self._object(int(row), missing_is_empty=True) for row in rows):
            raise UserError(f"caption_field: no .json in {self._tars[0]} has {self._field!r}; choose a key that it has")

    def _read_index(self, places: list[np.ndarray]) -> Iterator[str]:
        """Yield the names of records, tar by tar. Each tar's rows are appended to ``places``."""
        for tar in self._tars:
            keys, rows = _grouped(tar, self._members)
            places.append(rows)
            yield from (f"{tar.name}/{key}" for key in keys)

    def _read(self, index: int, kind: str, limit: int) -> bytes | None:
        """Return the bytes of a record's member of a kind. None where there is no such member."""
        name = self._names[index]
        offset, size = (int(number) for number in self._places[index, _COLUMN[kind]])
        if offset == _ABSENT:
            return None
        if size > limit:
            raise Unreadable(name, f"its .{kind} has {size} bytes, at most {limit} are read")
        try:
            with self._tars[self._tar_ids[index]].open("rb") as file:
                content = os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise Unreadable(name, f"the tar cannot be read: {error.strerror}") from None
        if len(content) != size:
            raise Unreadable(name, "the tar has become shorter since it was opened")
        return content

    def _object(self, index: int, missing_is_empty: bool = False) -> dict:
        try:
            content = self._read(index, "json", MAX_TEXT_BYTES)
            return {} if content is None else parsed_object(content, "its .json", self._names[index])
        except Unreadable:
            if missing_is_empty:
                return {}
            raise

    def _text(self, index: int) -> tuple[str | None, str | None]:
        """Return caption and condition."""
        name = self._names[index]
        kind = next((kind for kind in _TEXTS if self._places[index, _COLUMN[kind], 0] != _ABSENT), _TEXTS[0])
        text = self._read(index, kind, MAX_TEXT_BYTES)
        has_json = self._places[index, _COLUMN["json"], 0] != _ABSENT
        if has_json and (text is None or self._field is not None):
            caption = caption_in(self._object(index), self._options, name)
        else:
            caption = None if text is None else clean_text(decoded(text, f"its .{kind}", name), "caption", name)
        return caption, self._class(index)

    def _class(self, index: int) -> str | None:
        content = self._read(index, "cls", MAX_TEXT_BYTES)
        if content is None:
            return None
        digits = content.strip()
        if not digits.isdigit() or len(digits) > 18:
            raise Unreadable(self._names[index], "its .cls must hold the number of a class")
        return f"class {int(digits)}"


class _TarMember(NamedTuple):
    """A file in a tar: its name, and the place of its bytes."""

    name: str
    offset: int
    size: int


def _tar_members(path: Path) -> Iterator[_TarMember]:
    """Yield the files in a tar, in its order.

    Raises:
        UserError: a compressed, damaged or truncated tar, or a member that is a link, a device or sparse, or whose name
            is absolute or has "..". The message names the tar and the member.
    """
    shown = printable(str(path))
    try:
        _refuse_compressed(path, shown)
        with tarfile.open(path, "r:") as tar:
            yield from _checked(tar, shown)
            _refuse_truncated(tar, shown)
    except UserError:
        raise
    # A forged header can make tarfile raise nearly anything.
    except Exception as error:
        kind = kind_of_file(path)
        if kind not in (None, "a tar"):
            raise UserError(f"{shown} is no tar but {kind}; give it the name of what it is") from None
        raise UserError(
            f"{shown} is truncated, damaged or not a tar ({printable(str(error))}); copy it again"
        ) from None


def _is_tar(name: str) -> bool:
    return name.lower().endswith(".tar")


def _gap(names: Iterable[str]) -> str | None:
    """Return which numbers are missing among numbered tars, as after an incomplete download."""
    series: dict[tuple[str, int], set[int]] = {}
    for name in names:
        stem = name[: -len(".tar")]
        digits = _NUMBER.search(stem)
        if digits is not None:
            series.setdefault((stem[: digits.start()], len(digits[0])), set()).add(int(digits[0]))
    for (prefix, width), numbers in sorted(series.items()):
        count = max(numbers) - min(numbers) + 1
        # Larger gaps mean dates and the like, which are no count.
        if len(numbers) < count < 2 * len(numbers):
            first = next(number for number in range(min(numbers), max(numbers)) if number not in numbers)
            missing = printable(f"{prefix}{first:0{width}d}.tar")
            return f"{count - len(numbers)} of {count} tars that are numbered through are missing ({missing})"
    return None


def _grouped(tar: Path, unread: UnreadFiles) -> tuple[list[str], np.ndarray]:
    """Return the keys of a tar in its order, and the places of their members, int64 ``[N, kinds, 2]``.

    A second member of the same key and kind begins another record, as when two folders were put into one tar.

    Args:
        tar: the file.
        unread: counts members that are not read.
    """
    keys: list[str] = []
    rows: dict[str, int] = {}
    flat = array("q")
    taken: set[int] = set()
    for name, offset, size in _tar_members(tar):
        folder, _, base = name.rpartition("/")
        stem, _, kind = base.partition(".")
        column = _COLUMN.get(kind.lower())
        if not stem or column is None:
            is_dotted = stem and "." in kind and kind.rpartition(".")[2].lower() in _IMAGES
            unread.add(f"{tar.name}/{name}", _DOTTED if is_dotted else None)
            continue
        key = f"{folder}/{stem}" if folder else stem
        if key not in rows or rows[key] * len(_KINDS) + column in taken:
            rows[key] = len(keys)
            keys.append(key)
        taken.add(rows[key] * len(_KINDS) + column)
        flat.extend((rows[key], column, offset, size))
    places = np.full((len(keys), len(_KINDS), 2), _ABSENT, dtype=np.int64)
    found = np.array(flat, dtype=np.int64).reshape(-1, 4)
    places[found[:, 0], found[:, 1]] = found[:, 2:]
    return keys, places


def _checked(tar: tarfile.TarFile, shown: str) -> Iterator[_TarMember]:
    end = os.fstat(tar.fileobj.fileno()).st_size
    while (member := tar.next()) is not None:
        # The tar would keep every header that it has read.
        tar.members = []
        _refuse_unsafe(member, shown)
        if not 0 <= member.size <= end - member.offset_data:
            raise UserError(f"{shown} is truncated or damaged in member {printable(member.name)}; copy it again")
        if member.isfile():
            yield _TarMember(member.name.removeprefix("./"), member.offset_data, member.size)


def _refuse_compressed(path: Path, shown: str) -> None:
    with path.open("rb") as file:
        start = file.read(8)
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise UserError(f"{shown} is compressed ({name}), which allows no random access; decompress it")


def _refuse_unsafe(member: tarfile.TarInfo, shown: str) -> None:
    where = f"{shown}: member {printable(member.name)}"
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        raise UserError(f"{where} points outside the tar; make the tar again with relative names")
    if member.issparse() or not (member.isfile() or member.isdir()):
        raise UserError(f"{where} is a link, a device or sparse; make the tar again with plain files")


def _refuse_truncated(tar: tarfile.TarFile, shown: str) -> None:
    """Refuse a tar without an end, or with a damaged header. ``tarfile`` takes both for its end."""
    tar.fileobj.seek(tar.offset)
    found = tar.fileobj.read(_BLOCK)
    if len(found) < _BLOCK or found.strip(b"\0"):
        raise UserError(f"{shown} is truncated or damaged after {tar.offset} bytes; copy it again")
