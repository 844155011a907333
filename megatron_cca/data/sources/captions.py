"""Images with captions in a ``captions.jsonl``, or in a text file beside each image."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_cca.data.sources.files import (
    MAX_IMAGE_BYTES,
    MAX_TEXT_BYTES,
    is_file,
    is_folder,
    own_file,
    read_below,
    real_folder,
)
from megatron_cca.data.sources.lines import JsonLines
from megatron_cca.data.sources.records import Record, Source, SourceOptions, Unreadable, checked_index
from megatron_cca.data.sources.texts import PackedStrings, caption_in, decoded, short_hash, tidy, unique_names
from megatron_cca.data.sources.trees import ImageTree, is_image, walked
from megatron_cca.errors import UserError

LIST = "captions.jsonl"
# A tree is recognised by its first images: it may have millions.
_LOOKED_AT = 1000


def recognises(path: Path) -> bool:
    """Whether a folder has a ``captions.jsonl``, or texts beside its images."""
    if not is_folder(path):
        return False
    return os.path.lexists(path / LIST) or _has_texts(path)


def _has_texts(path: Path) -> bool:
    images = islice((name for name in walked(path) if is_image(name)), _LOOKED_AT)
    return any(is_file((path / name).with_suffix(".txt")) for name in images)


def open_captions(path: Path, options: SourceOptions) -> Source:
    """The source in a folder.

    Raises:
        UserError: no images or lines; a ``caption_field`` that no line has.
    """
    if not is_folder(path):
        raise UserError(f"{path} is not a folder; give the one that holds the images")
    root = real_folder(path)
    if os.path.lexists(path / LIST):
        return CaptionLines(root, options.caption_field)
    if options.caption_field is not None:
        raise UserError(f"caption_field: {path} has no {LIST}, and text files have no fields; leave it out")
    return CaptionTree(root)


class CaptionLines:
    """``captions.jsonl``: {"file_name": ..., "caption": ..., "condition": ...}, or "frames": [...] for a clip."""

    def __init__(self, root: Path, caption_field: str | None) -> None:
        self._root = root
        self._field = caption_field
        self._lines = JsonLines(own_file(root, LIST))
        self._has_field = caption_field is None
        self._names = PackedStrings(unique_names(self._first_names()))
        if not self._has_field:
            raise UserError(f"caption_field: no line of {root / LIST} has {caption_field!r}; choose a key that it has")

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Record:
        index = checked_index(index, len(self))
        name = self._names[index]
        found = self._lines.object(index)
        caption, condition = caption_in(found, self._field, name), tidy(found.get("condition"), "condition", name)
        return Record(name, caption, condition, self._frames(_references(found, name), name))

    def fingerprint(self) -> str:
        """See :class:`Source`."""
        return short_hash(self._lines.digest, self._field)

    def _first_names(self) -> Iterator[str]:
        """Each line's first file, or the line where it names none."""
        for index, found in enumerate(self._lines.objects()):
            label = self._lines.label(index)
            self._has_field |= self._field in found
            try:
                yield _references(found, label)[0]
            except Unreadable:
                yield label

    def _frames(self, references: list[str], name: str) -> tuple[bytes, ...]:
        frames, left = [], MAX_IMAGE_BYTES
        for reference in references:
            frames.append(read_below(self._root, reference, name, left))
            left -= len(frames[-1])
        return tuple(frames)


def _references(found: dict[str, Any], name: str) -> list[str]:
    """The image files that a line names, at least one.

    Raises:
        Unreadable: none, or not strings.
    """
    if ("file_name" in found) == ("frames" in found):
        raise Unreadable(name, 'the line needs either "file_name" or "frames"')
    references = found["frames"] if "frames" in found else [found["file_name"]]
    if not isinstance(references, list) or not all(isinstance(file, str) and file for file in references):
        key = "frames" if "frames" in found else "file_name"
        raise Unreadable(name, f'"{key}" must be {"a list of file names" if key == "frames" else "a file name"}')
    if not references:
        raise Unreadable(name, '"frames" names no files')
    return references


class CaptionTree:
    """A tree of images with a ``.txt`` beside each; an image without one has no caption."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._images = ImageTree(root)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Record:
        index = checked_index(index, len(self))
        name, path = self._images.names[index], self._images.paths[index]
        text = self._text(path, name)
        caption = None if text is None else tidy(decoded(text, "the .txt beside it", name), "caption", name)
        return Record(name, caption, None, (read_below(self._root, path, name),))

    def fingerprint(self) -> str:
        """See :class:`Source`; reads every text."""
        digest = self._images.digest()
        for index in range(len(self)):
            try:
                text = self._text(self._images.paths[index], "")
                digest.update(b"none" if text is None else b"%d\0" % len(text) + text)
            except Unreadable as error:
                digest.update(str(error).encode())
        return digest.hexdigest()[:16]

    def _text(self, path: str, name: str) -> bytes | None:
        beside = Path(path).with_suffix(".txt")
        if not os.path.lexists(self._root / beside):
            return None
        return read_below(self._root, str(beside), name, MAX_TEXT_BYTES, may_be_empty=True)
