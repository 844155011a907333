"""Read images with captions in a ``captions.jsonl``, or in a text file beside each image."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cca.data.sources.external_text import (
    JsonLines,
    PackedStrings,
    caption_in,
    clean_text,
    decoded,
    option_entry,
    printable,
    short_hash,
    unique_names,
)
from megatron_cca.data.sources.folders import (
    LINKED,
    MAX_IMAGE_BYTES,
    MAX_TEXT_BYTES,
    ImageTree,
    Root,
    UnreadFiles,
    checked_file,
    count_missing,
    first_images,
    is_folder,
    is_image,
    name_hashes,
    outside_hint,
    read_below,
    real_folder,
    text_beside,
    walk_files,
)
from megatron_cca.data.sources.source_protocol import Record, Source, SourceOptions, Unreadable, checked_index
from megatron_cca.errors import UserError

LIST = "captions.jsonl"
# Of this many references outside the folder the common place is searched for the message.
_OUTSIDE_CHECKED = 1000


def recognises(path: Path, options: SourceOptions) -> bool:
    """Return whether a folder has a ``captions.jsonl``, or texts beside its images."""
    if not is_folder(path):
        return False
    return os.path.lexists(path / LIST) or _has_texts(real_folder(path, options.allow_outside))


def open_captions(path: Path, options: SourceOptions) -> Source:
    """Open the source in a folder.

    Raises:
        UserError: no images or lines, or a ``caption_field`` that no line has.
    """
    if not is_folder(path):
        raise UserError(f"{path} is not a folder; give the one that holds the images")
    root = real_folder(path, options.allow_outside)
    if os.path.lexists(path / LIST):
        return CaptionLines(root, options)
    for option in ("caption_field", "caption_of_list"):
        if getattr(options, option) is not None:
            raise UserError(f"{option}: {path} has no {LIST}, and text files have no fields; leave it out")
    return CaptionTree(root)


class CaptionLines:
    """The lines of ``captions.jsonl``: {"file_name": ..., "caption": ..., "condition": ...}.

    A clip has "frames": [...].
    """

    def __init__(self, root: Root, options: SourceOptions) -> None:
        self._root, self._options = root, options
        # JsonLines refuses files of another kind.
        self._lines = JsonLines(checked_file(root, LIST, kinds=None))
        self._has_field = options.caption_field is None
        self._listed, self._outside = array("q"), []
        self._names = PackedStrings(unique_names(self._first_names()))
        if not self._has_field:
            raise UserError(
                f"caption_field: no line of {root / LIST} has {options.caption_field!r}; choose a key that it has"
            )
        if len(self._outside) == len(self):
            raise UserError(self._outside_line())

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Record:
        index = checked_index(index, len(self))
        name = self._names[index]
        found = self._lines.object(index)
        caption = caption_in(found, self._options, name)
        condition = clean_text(found.get("condition"), "condition", name)
        return Record(name, caption, condition, self._frames(_references(found, name), name))

    def fingerprint(self) -> str:
        """See :class:`Source`."""
        return short_hash(self._lines.digest, self._options.caption_field, *option_entry(self._options.caption_of_list))

    def notices(self) -> list[str]:
        """See :class:`Source`. Walks through the folder."""
        lines, listed = [], np.array(self._listed, dtype=np.int64)
        if self._outside:
            lines.append(self._outside_line())
        if repeats := len(listed) - len(np.unique(listed)):
            lines.append(f"{LIST} names {repeats} images again that it has named before; each line is a sample")
        unread = UnreadFiles()
        images = name_hashes(_images_in(self._root, unread))
        if unlisted := count_missing(images, listed):
            lines.append(f"{unlisted} of {len(images)} images that lie there are not in {LIST} and are not read")
        return lines + ([line] if (line := unread.line()) else [])

    def _first_names(self) -> Iterator[str]:
        """Yield each line's first file, or the label of a line that names none."""
        for index, found in enumerate(self._lines.objects()):
            label = self._lines.label(index)
            self._has_field |= self._options.caption_field in found
            try:
                references = _references(found, label)
            except Unreadable:
                yield label
                continue
            self._listed.extend(hash(self._relative(reference)) for reference in references)
            if outside := [reference for reference in references if self._leaves(reference)]:
                self._outside.append(outside[0])
            yield references[0]

    def _relative(self, reference: str) -> str:
        """Return the name of a file as a walk through the folder gives it."""
        return os.path.normpath(reference).removeprefix(f"{self._root}/")

    def _leaves(self, reference: str) -> bool:
        """Return whether a file lies outside the folder. Links are resolved only where the name alone suggests that."""
        relative = self._relative(reference)
        if not relative.startswith(("/", "../")):
            return False
        try:
            return not self._root.holds(reference)
        except ValueError:
            return False

    def _outside_line(self) -> str:
        first = self._outside[0]
        targets = [os.path.join(self._root, name) for name in self._outside[:_OUTSIDE_CHECKED]]  # noqa: PTH118
        return (
            f"{len(self._outside)} of {len(self)} lines of {printable(str(self._root / LIST))} name files outside the "
            f"folder, such as {printable(first)}; {outside_hint(targets)}"
        )

    def _frames(self, references: list[str], name: str) -> tuple[bytes, ...]:
        frames, left = [], MAX_IMAGE_BYTES
        for reference in references:
            frames.append(read_below(self._root, reference, name, left))
            left -= len(frames[-1])
        return tuple(frames)


class CaptionTree:
    """A tree of images with a text (``.txt``, ``.caption``) beside each. An image without text has no caption."""

    def __init__(self, root: Root) -> None:
        self._root = root
        self._images = ImageTree(root, wants_texts=True)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Record:
        index = checked_index(index, len(self))
        name, path = self._images.names[index], self._images.paths[index]
        beside = text_beside(self._root, path)
        text = self._text(beside, name)
        what = f"the {Path(beside).suffix} beside it" if beside else ""
        caption = None if text is None else clean_text(decoded(text, what, name), "caption", name)
        return Record(name, caption, None, (read_below(self._root, path, name),))

    def fingerprint(self) -> str:
        """See :class:`Source`. Reads every text."""
        digest = self._images.digest()
        for index in range(len(self)):
            try:
                text = self._text(text_beside(self._root, self._images.paths[index]), "")
                digest.update(b"none" if text is None else b"%d\0" % len(text) + text)
            except Unreadable as error:
                digest.update(str(error).encode())
        return digest.hexdigest()[:16]

    def notices(self) -> list[str]:
        """See :class:`Source`."""
        images, texts = (name_hashes(map(_stem, _all(names))) for names in (self._images.paths, self._images.texts))
        lines = self._images.notices()
        mute = count_missing(images, texts)
        if mute == len(images):
            lines.insert(0, f"none of {mute} images has a text (.txt) beside it, and there is no {LIST}")
        elif mute:
            lines.insert(0, f"{mute} of {len(images)} images have no text (.txt) beside them")
        orphans = np.flatnonzero(~np.isin(texts, images))
        if len(orphans):
            name = printable(self._images.texts[int(orphans[0])])
            lines.append(f"{len(orphans)} texts have no image beside them ({name})")
        if shared := len(images) - len(np.unique(images)):
            lines.append(f"{shared} images share the text of another one whose name differs in its suffix alone")
        if second := len(texts) - len(np.unique(texts)):
            lines.append(f"{second} texts are second ones of an image; of several the first of .txt, .caption is read")
        return lines

    def _text(self, beside: str | None, name: str) -> bytes | None:
        return None if beside is None else read_below(self._root, beside, name, MAX_TEXT_BYTES, may_be_empty=True)


def _has_texts(root: Root) -> bool:
    return any(text_beside(root, name) is not None for name in first_images(root))


def _images_in(root: Root, unread: UnreadFiles) -> Iterator[str]:
    for name in walk_files(root, unread, strict=False):
        if is_image(name):
            yield name
        elif name != LIST:
            unread.add(name, LINKED if name.endswith("/") else None)


def _references(found: dict[str, Any], name: str) -> list[str]:
    """Return the image files of a line, at least one.

    Raises:
        Unreadable: there are none, or they are not strings.
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


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]  # noqa: PTH122 - called for every file


def _all(names: PackedStrings) -> Iterator[str]:
    return (names[index] for index in range(len(names)))
