"""Read folders that Hugging Face's ``datasets`` opens: parquet, arrow, images with metadata, ``save_to_disk``."""

from __future__ import annotations

import hashlib
import os
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from megatron_cca.data.sources.external_text import (
    CAPTION_FIELDS,
    OF_LIST_HINT,
    caption_of,
    clean_text,
    option_entry,
    printable,
)
from megatron_cca.data.sources.folders import (
    Root,
    count_missing,
    is_folder,
    is_image,
    name_hashes,
    read_below,
    real_folder,
    walk_files,
)
from megatron_cca.data.sources.hf_files import METADATA, Opened, is_saved, open_folder
from megatron_cca.data.sources.source_protocol import Record, Source, SourceOptions, Unreadable, checked_index
from megatron_cca.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

_NAMES = (*CAPTION_FIELDS, "prompt")
_NAMES_OF_LISTS = (*_NAMES, *(f"{name}s" for name in _NAMES))
# How many files are checked, since a tree of images may have millions and no data set.
_FILES_TO_RECOGNISE = 100_000


def recognises(path: Path, options: SourceOptions) -> bool:
    """Return whether ``datasets`` saved a folder, or it has parquet, arrow or a metadata file."""
    if not is_folder(path):
        return False
    if is_saved(path):
        return True
    files = islice(walk_files(real_folder(path, options.allow_outside), strict=False), _FILES_TO_RECOGNISE)
    return any(PurePosixPath(file).name in METADATA or file.endswith((".parquet", ".arrow")) for file in files)


def open_huggingface(path: Path, options: SourceOptions) -> Source:
    """Open the source in a folder.

    Raises:
        UserError: what :func:`~megatron_cca.data.sources.hf_files.open_folder` refuses, or a missing column.
    """
    if not is_folder(path):
        raise UserError(f"{path} is not a folder; give the one that holds the data set")
    root = real_folder(path, options.allow_outside)
    opened = open_folder(root, options.split)
    if not len(opened.dataset):
        raise UserError(f"{path}: split {opened.split} is empty")
    return DatasetRows(root, opened, options)


class DatasetRows:
    """The rows of a split, named "train:17" (counted from 0)."""

    def __init__(self, root: Root, opened: Opened, options: SourceOptions) -> None:
        from datasets import ClassLabel, Image

        dataset = opened.dataset
        self._root, self._opened, self._of_list = root, opened, options.caption_of_list
        self._split = printable(opened.split)
        self._image = _image_column(dataset, options.image_field, root)
        self._caption, self._others = _caption_column(dataset, options, self._image, root)
        label = dataset.features[self._caption] if self._caption else None
        self._label = label if isinstance(label, ClassLabel) else None
        columns = [self._image, *([self._caption] if self._caption else [])]
        try:
            self._rows = dataset.select_columns(columns).cast_column(self._image, Image(decode=False))
        # datasets and pyarrow raise a different exception for every type that is no image.
        except Exception:
            raise UserError(f"image_field: {root}: column {self._image!r} holds no images; choose another") from None

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        index = checked_index(index, len(self))
        name = f"{self._split}:{index}"
        try:
            row = self._rows[index]
        # pyarrow reads a damaged file.
        except Exception as error:
            raise Unreadable(name, f"the row cannot be read: {printable(str(error))}") from None
        caption, condition = self._text(row[self._caption] if self._caption else None, name)
        return Record(name, caption, condition, (image_bytes(self._root, row[self._image], name),))

    def fingerprint(self) -> str:
        """See :class:`Source`. Reads every caption."""
        digest = hashlib.sha256(
            repr((self._split, self._image, self._caption, len(self), *option_entry(self._of_list))).encode()
        )
        rows = self._rows.remove_columns(self._image) if self._caption else None
        for start in range(0, len(self) if rows is not None else 0, 1000):
            try:
                captions = rows[start : start + 1000]
            # pyarrow reads a damaged file. Reading its rows reports that.
            except Exception as error:
                captions = type(error).__name__
            digest.update(repr(captions).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()[:16]

    def notices(self) -> list[str]:
        """See :class:`Source`. Walks through the folder if the data are a list of its images."""
        lines = [*self._opened.notices, *self._others]
        if self._opened.lists_images:
            listed = name_hashes(os.path.relpath(path, self._root) for path in self._paths())
            images = name_hashes(name for name in walk_files(self._root, strict=False) if is_image(name))
            if unlisted := count_missing(images, listed):
                lines.insert(
                    0, f"{unlisted} of {len(images)} images that lie there are in no metadata and are not read"
                )
        return lines

    def _paths(self) -> list[str]:
        return [row["path"] for row in self._rows[self._image] if row and row["path"]]

    def _text(self, value: Any, name: str) -> tuple[str | None, str | None]:
        """Return caption and condition."""
        if self._label is None:
            return caption_of(value, self._of_list, name), None
        if value is None or value < 0:
            return None, None
        caption = clean_text(self._label.int2str(value), "label", name)
        return caption, caption


def image_bytes(root: Root, value: dict[str, Any] | None, name: str) -> bytes:
    """Return the contents of an image as ``datasets`` stores it: its bytes, or the path of its file.

    Raises:
        Unreadable: there is none, or what :func:`~megatron_cca.data.sources.folders.read_below` refuses.
    """
    content, path = (value or {}).get("bytes"), (value or {}).get("path")
    if content:
        return content
    if not path:
        raise Unreadable(name, "has no image")
    # datasets makes the paths of images in a folder absolute.
    inside = os.path.normpath(path).startswith(f"{root}/")
    return read_below(root, os.path.relpath(path, root) if inside else path, name)


def _image_column(dataset: Dataset, field: str | None, root: Root) -> str:
    from datasets import Image

    images = [name for name, feature in dataset.features.items() if isinstance(feature, Image)]
    if field is None and not images and "image" in dataset.column_names:
        images = ["image"]
    shown = ", ".join(printable(name) for name in dataset.column_names)
    if field is not None and field not in dataset.column_names:
        raise UserError(f"image_field: {root} has no column {printable(field)!r}; choose one of {shown}")
    if field is None and len(images) != 1:
        found = ", ".join(printable(name) for name in images) or "no column of images"
        raise UserError(f"image_field: {root} has {found}; choose one of {shown}")
    return field if field is not None else images[0]


def _caption_column(
    dataset: Dataset, options: SourceOptions, image: str, root: Root
) -> tuple[str | None, tuple[str, ...]]:
    """Return the column with text, else the one with classes. None where there is neither.

    Args:
        dataset: the rows.
        options: of the user. They may name the column, and allow lists of captions.
        image: the column of the images.
        root: the folder of the data, for messages.

    Returns:
        Its name, and notices about the other columns, see :class:`~megatron_cca.data.sources.source_protocol.Source`.

    Raises:
        UserError: no such column, several possible ones, texts under no known name, or lists of captions that are not
            allowed.
    """
    from datasets import ClassLabel

    texts, lists = _texts(dataset, image)
    labels = [name for name, feature in dataset.features.items() if isinstance(feature, ClassLabel)]
    field = options.caption_field
    if field is not None:
        if field not in texts + labels + lists:
            shown = _shown(texts + labels + lists) or "none"
            raise UserError(f"caption_field: {root} has no text in {printable(field)!r}; columns of text: {shown}")
        if field in lists and options.caption_of_list is None:
            raise UserError(_of_lists(root, field))
        return field, ()
    if found := [name for name in _NAMES if name in texts]:
        return found[0], ()
    named_lists = [name for name in _NAMES_OF_LISTS if name in lists]
    if named_lists and (options.caption_of_list is not None or not labels):
        if options.caption_of_list is None:
            raise UserError(_of_lists(root, named_lists[0]))
        return named_lists[0], ()
    if len(labels) > 1:
        raise UserError(f"caption_field: {root} has several columns of classes; choose one of {', '.join(labels)}")
    if not labels and (texts or lists):
        raise UserError(
            f"caption_field: {root} has no column {', '.join(_NAMES)}; --caption-field chooses one of "
            f"{_shown(texts + lists)}"
        )
    others = (f"columns of text are not read (--caption-field): {_shown(texts + lists)}",) if texts + lists else ()
    return (labels[0], others) if labels else (None, ())


def _texts(dataset: Dataset, image: str) -> tuple[list[str], list[str]]:
    """Return the columns of text, and those of lists of texts."""
    features = {name: feature for name, feature in dataset.features.items() if name != image}
    lists = [name for name, feature in features.items() if _is_text(_inner(feature))]
    return [name for name, feature in features.items() if _is_text(feature)], lists


def _inner(feature: Any) -> Any:
    """Return the feature inside a list."""
    return feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", None)


def _is_text(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string", "string_view")


def _shown(names: list[str]) -> str:
    return ", ".join(map(printable, names))


def _of_lists(root: Root, column: str) -> str:
    return f"caption_field: {root}: column {printable(column)!r} holds lists of captions; {OF_LIST_HINT}"
