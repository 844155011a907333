"""Read preferences: lines of ``preferences.jsonl`` or rows of a data set, each of which says which image is better."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_cca.data.sources import hf_rows
from megatron_cca.data.sources.external_text import (
    CAPTION_FIELDS,
    JsonLines,
    PackedStrings,
    caption_of,
    option_entry,
    printable,
    short_hash,
    unique_names,
)
from megatron_cca.data.sources.folders import (
    Root,
    checked_file,
    count_missing,
    is_folder,
    is_image,
    name_hashes,
    read_below,
    real_folder,
    walk_files,
)
from megatron_cca.data.sources.hf_files import Opened, open_folder, stored_schema
from megatron_cca.data.sources.judgements import (
    BETTER_AND_WORSE,
    IS_JUDGED,
    WANTED,
    Judgement,
    compared,
    is_unjudged,
    judgement_of,
)
from megatron_cca.data.sources.source_protocol import (
    Comparison,
    NoPair,
    Source,
    SourceOptions,
    Unreadable,
    checked_index,
)
from megatron_cca.errors import UserError

if TYPE_CHECKING:
    import pyarrow

LIST = "preferences.jsonl"
_CAPTIONS = ("prompt", *CAPTION_FIELDS)
_CLASS = "label"


def recognises(path: Path, options: SourceOptions) -> bool:
    """Return whether a folder has a ``preferences.jsonl``, or a data set whose columns say which image is better."""
    if not is_folder(path):
        return False
    if os.path.lexists(path / LIST):
        return True
    if not hf_rows.recognises(path, options):
        return False
    schema = stored_schema(real_folder(path, options.allow_outside), options.split)
    return schema is not None and _judgement(schema) is not None


def open_preferences(path: Path, options: SourceOptions) -> Source:
    """Open the source in a folder.

    Raises:
        UserError: neither lines nor a data set, a ``caption_field`` that it has not, or columns that do not say which
            image is better.
    """
    if not is_folder(path):
        raise UserError(f"{path} is not a folder; give the one that holds {LIST} or a data set")
    root = real_folder(path, options.allow_outside)
    if not os.path.lexists(path / LIST):
        return ComparedRows(root, open_folder(root, options.split), options)
    if options.split is not None:
        raise UserError(f"split: {printable(str(root / LIST))} has no splits; leave it out")
    return ComparedLines(root, options)


class ComparedLines:
    """The lines of ``preferences.jsonl``: {"prompt": ..., "winner": ..., "loser": ...}, see ``judgements``."""

    def __init__(self, root: Root, options: SourceOptions) -> None:
        self._root, self._options = root, options
        self._lines = JsonLines(checked_file(root, LIST, kinds=None))
        field = options.caption_field
        if field is not None and not any(field in found for found in self._lines.objects()):
            raise UserError(
                f"caption_field: no line of {root / LIST} has {printable(field)!r}; choose a key that it has"
            )

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Comparison:
        index = checked_index(index, len(self))
        name, found = self._lines.label(index), self._lines.object(index)
        caption = _caption(found, self._options, name)
        return compared(name, caption, _label(found, name), _judged(found, name), self._read)

    def fingerprint(self) -> str:
        """See :class:`Source`."""
        options = (self._options.caption_field, self._options.caption_of_list)
        return short_hash(LIST, self._lines.digest, *(entry for option in options for entry in option_entry(option)))

    def notices(self) -> list[str]:
        """See :class:`Source`. Walks through the folder."""
        listed = name_hashes(name for found in self._lines.objects() for name in self._names(found))
        images = name_hashes(name for name in walk_files(self._root, strict=False) if is_image(name))
        unlisted = count_missing(images, listed)
        return [f"{unlisted} of {len(images)} images that lie there are not in {LIST} and are not read"] * (
            unlisted > 0
        )

    def _names(self, found: dict[str, Any]) -> list[str]:
        """Return the names of a line's images, as a walk through the folder gives them."""
        try:
            images, _ = _judged(found, "")
        except Unreadable:
            return []
        return [os.path.normpath(one).removeprefix(f"{self._root}/") for one in images if isinstance(one, str)]

    def _read(self, image: Any, name: str) -> bytes:
        if not isinstance(image, str):
            raise Unreadable(name, "must be a file name")
        return read_below(self._root, image, name)


class ComparedRows:
    """The rows of a split, or groups of rows of one prompt. A row is named "train:17", a group by its prompt's id."""

    def __init__(self, root: Root, opened: Opened, options: SourceOptions) -> None:
        dataset = opened.dataset
        self._root, self._opened, self._of_list = root, opened, options.caption_of_list
        self._split = printable(opened.split)
        judgement = _judgement(dataset.data.schema)
        if judgement is None:
            shown = ", ".join(map(printable, dataset.column_names))
            raise UserError(f"{root}: its columns do not say which image is better ({shown}); it takes {WANTED}")
        if not len(dataset):
            raise UserError(f"{root}: split {self._split} is empty")
        self._judgement, self._caption = judgement, _caption_column(dataset.column_names, options.caption_field, root)
        others = [self._caption, *judgement.names, *({IS_JUDGED} & set(dataset.column_names))]
        # Arrow's own rows keep images encoded.
        self._rows = dataset.select_columns([*judgement.images, *others]).with_format("arrow")
        self._texts = dataset.select_columns(others).with_format("arrow")
        self._members, self._names = self._groups() if judgement.group else (None, None)

    def __len__(self) -> int:
        return len(self._rows) if self._members is None else len(self._members)

    def __getitem__(self, index: int) -> Comparison:
        index = checked_index(index, len(self))
        name = f"{self._split}:{index if self._names is None else self._names[index]}"
        members = [index] if self._members is None else self._members[index].tolist()
        try:
            rows = [self._rows[row : row + 1].to_pylist()[0] for row in members]
        # pyarrow reads a damaged file.
        except Exception as error:
            raise Unreadable(name, f"the row cannot be read: {printable(str(error))}") from None
        captions = {str(row[self._caption]) for row in rows}
        if len(captions) > 1:
            raise Unreadable(name, f"has {len(captions)} different prompts under one {self._judgement.group}")
        if is_unjudged(rows[0]):
            raise NoPair(name, "nobody judged it")
        caption = caption_of(rows[0][self._caption], self._of_list, name)
        return compared(name, caption, None, self._judgement.of(rows), self._read)

    def fingerprint(self) -> str:
        """See :class:`Source`. Reads everything but the images."""
        digest = hashlib.sha256(
            repr((self._split, self._judgement, self._caption, len(self), *option_entry(self._of_list))).encode()
        )
        for start in range(0, len(self._texts), 1000):
            try:
                texts = self._texts[start : start + 1000].to_pylist()
            # pyarrow reads a damaged file. Reading its rows reports that.
            except Exception as error:
                texts = type(error).__name__
            digest.update(repr(texts).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()[:16]

    def notices(self) -> list[str]:
        """See :class:`Source`."""
        return list(self._opened.notices)

    def _groups(self) -> tuple[list[np.ndarray], PackedStrings]:
        """Return the rows of each group, and its name. The groups come in the order of their first rows."""
        keys = [str(key) for key in self._texts[:][self._judgement.group].to_pylist()]
        _, first, of = np.unique(np.array(keys), return_index=True, return_inverse=True)
        members = np.split(np.argsort(of, kind="stable"), np.cumsum(np.bincount(of))[:-1])
        return [members[group] for group in np.argsort(first)], PackedStrings(
            unique_names(keys[row] for row in sorted(first))
        )

    def _read(self, image: Any, name: str) -> bytes:
        if isinstance(image, bytes):
            return image
        if isinstance(image, str):
            return read_below(self._root, image, name)
        return hf_rows.image_bytes(self._root, image, name)


def _judgement(schema: pyarrow.Schema) -> Judgement | None:
    import pyarrow.types

    lists = [
        field.name for field in schema if pyarrow.types.is_list(field.type) or pyarrow.types.is_large_list(field.type)
    ]
    return judgement_of(schema.names, lists)


def _judged(found: dict[str, Any], name: str) -> tuple[list[Any], list[Any]]:
    """Return the images of a line and their scores.

    Raises:
        Unreadable: it does not say which one is better.
    """
    keys = set(found)
    # A line that names one of the two has one image.
    for pair in BETTER_AND_WORSE:
        keys |= set(pair) if keys & set(pair) else set()
    judgement = judgement_of(keys, [key for key, value in found.items() if isinstance(value, list)])
    if judgement is None or judgement.group is not None:
        raise Unreadable(name, f"the line needs {WANTED}")
    return judgement.of([found])


def _caption(found: dict[str, Any], options: SourceOptions, name: str) -> str | None:
    fields = _CAPTIONS if options.caption_field is None else (options.caption_field,)
    value = next((found[key] for key in fields if found.get(key) is not None), None)
    return caption_of(value, options.caption_of_list, name)


def _label(found: dict[str, Any], name: str) -> int | None:
    """Return the class in a line, for a model that takes classes.

    Raises:
        Unreadable: it is no whole number from 0.
    """
    label = found.get(_CLASS)
    if label is not None and (type(label) is not int or label < 0):
        raise Unreadable(name, f'"{_CLASS}" must be the number of a class')
    return label


def _caption_column(columns: list[str], field: str | None, root: Root) -> str:
    found = [name for name in (_CAPTIONS if field is None else (field,)) if name in columns]
    if not found:
        wanted = ", ".join(_CAPTIONS) if field is None else repr(printable(field))
        shown = ", ".join(map(printable, columns))
        raise UserError(f"caption_field: {root} has no column {wanted}; --caption-field chooses one of {shown}")
    return found[0]
