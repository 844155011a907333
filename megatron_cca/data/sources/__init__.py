"""Sources of images with captions. Every layout on disk has a module, and an entry in :data:`SOURCE_LAYOUTS`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path

from megatron_cca.data.sources import (
    captions,
    classes,
    emu3,
    hf_rows,
    idx,
    journeydb,
    llamagen,
    preferences,
    webdataset,
)
from megatron_cca.data.sources.external_text import OF_LIST, printable, split_of
from megatron_cca.data.sources.folders import is_file, is_folder, is_image, names_in, real_folder, walk_files
from megatron_cca.data.sources.source_protocol import Record, Source, SourceOptions, Unreadable
from megatron_cca.errors import UserError
from megatron_cca.io.file_contents import kind_of_file

__all__ = [
    "AUTO",
    "DEFAULTS",
    "SOURCE_LAYOUTS",
    "Record",
    "Source",
    "SourceLayout",
    "SourceOptions",
    "Unreadable",
    "open_source",
]

AUTO = "auto"
DEFAULTS = SourceOptions()
# How many files of a folder with no known layout are listed, since a tree may have millions.
_FILES_CHECKED = 100_000
_PACKED = (".zip", ".7z", ".rar", ".gz", ".bz2", ".xz", ".zst")
_LISTS = (".csv", ".tsv", ".json", ".jsonl", ".xlsx", ".yaml", ".yml")


@dataclass(frozen=True)
class SourceLayout:
    """One layout of images and captions on disk.

    Attributes:
        recognises: returns quickly whether a path has this layout.
        opens: returns the source in a path. Raises UserError.
        options: the fields of :class:`SourceOptions` that it uses. All layouts use ``allow_outside``.
    """

    recognises: Callable[[Path, SourceOptions], bool]
    opens: Callable[[Path, SourceOptions], Source]
    options: frozenset[str] = frozenset()


_CAPTION_OPTIONS = frozenset({"caption_field", "caption_of_list"})
SOURCE_LAYOUTS: dict[str, SourceLayout] = {
    "captions": SourceLayout(captions.recognises, captions.open_captions, _CAPTION_OPTIONS),
    "classes": SourceLayout(classes.recognises, classes.open_classes),
    "journeydb": SourceLayout(journeydb.recognises, journeydb.open_journeydb, frozenset({"caption_field", "split"})),
    "webdataset": SourceLayout(webdataset.recognises, webdataset.open_webdataset, _CAPTION_OPTIONS),
    "datasets": SourceLayout(hf_rows.recognises, hf_rows.open_huggingface, _CAPTION_OPTIONS | {"image_field", "split"}),
    "preferences": SourceLayout(preferences.recognises, preferences.open_preferences, _CAPTION_OPTIONS | {"split"}),
    "idx": SourceLayout(idx.recognises, idx.open_idx, frozenset({"split"})),
    "emu3": SourceLayout(emu3.recognises, emu3.open_emu3),
    "llamagen": SourceLayout(llamagen.recognises, llamagen.open_llamagen),
}
_CHOOSE = f"set the layout to one of {', '.join(SOURCE_LAYOUTS)}"


def open_source(path: Path, layout: str = AUTO, options: SourceOptions = DEFAULTS) -> Source:
    """Open the images and captions in a path.

    Args:
        path: a folder. For webdataset also a tar, for emu3 also a list. Nothing outside it is read, except for the
            folder in a list of Emu3's, the contents of a snapshot in the hub's cache, and ``allow_outside``.
        layout: a key of :data:`SOURCE_LAYOUTS`, or "auto".
        options: what differs from the layout's defaults.

    Raises:
        UserError: nothing there, nothing in it, an unknown or unrecognisable layout, an option that the layout does not
            use, or what the layout refuses.
    """
    path = Path(path)
    if layout not in (AUTO, *SOURCE_LAYOUTS):
        raise UserError(f"layout: {printable(layout)!r} is unknown; choose one of {', '.join((AUTO, *SOURCE_LAYOUTS))}")
    _check_path(path)
    _check_options(options)
    if layout == AUTO:
        layout = _recognised(path, options)
    for option in fields(options):
        meant = option.name == "allow_outside" or option.name in SOURCE_LAYOUTS[layout].options
        if getattr(options, option.name) is not None and not meant:
            raise UserError(f"{option.name}: means nothing to the layout {layout}; leave it out")
    try:
        return SOURCE_LAYOUTS[layout].opens(path, options)
    except UserError as error:
        raise UserError(f"layout {layout}: {_on_one_line(str(error))}") from None


def _check_path(path: Path) -> None:
    shown = printable(str(path))
    if not is_file(path) and not is_folder(path):
        raise UserError(f"{shown} does not exist; give a folder with images")
    if not os.access(path, os.R_OK | (os.X_OK if is_folder(path) else 0), effective_ids=True):
        raise UserError(f"{shown} may not be read; change its permissions")

    if is_folder(path / "blobs") and is_folder(path / "snapshots"):
        snapshots = ", ".join(printable(f"{shown}/snapshots/{name}") for name in names_in(path / "snapshots"))
        raise UserError(f"{shown} is a repository in the hub's cache; give one of its snapshots: {snapshots}")


def _check_options(options: SourceOptions) -> None:
    for folder in options.allow_outside or ():
        if not is_folder(folder):
            raise UserError(f"allow_outside: {printable(str(folder))} is not a folder; give one that holds images")
    if options.caption_of_list not in (None, *OF_LIST):
        raise UserError(
            f"caption_of_list: {printable(str(options.caption_of_list))!r} is unknown; choose {' or '.join(OF_LIST)}"
        )


def _recognised(path: Path, options: SourceOptions) -> str:
    found = [name for name, layout in SOURCE_LAYOUTS.items() if layout.recognises(path, options)]
    if len(found) > 1:
        # Images in sub-folders are classes only where there is no list beside them.
        found = [name for name in found if name != "classes"]
    if "preferences" in found:
        # A data set of preferences is one of images and captions, too.
        found = [name for name in found if name != "datasets"]
    if len(found) > 1:
        raise UserError(f"{printable(str(path))} could be {' or '.join(found)}; {_CHOOSE}")
    if not found:
        raise UserError(f"{printable(str(path))} has no layout known here; {_advice(path, options)}")
    return found[0]


def _advice(path: Path, options: SourceOptions) -> str:
    """Return what would make a source of a folder with no known layout.

    Raises:
        UserError: a link to a folder in it. Everything may lie behind such links.
    """
    if is_file(path):
        kind = kind_of_file(path)
        found = f"it is {kind}" if kind else "it is one file"
        return f"{found}; give the folder that it lies in, a tar, or a list of Emu3's"
    for _ in islice(walk_files(real_folder(path, options.allow_outside)), _FILES_CHECKED):
        pass
    names = names_in(path)
    folders = [name for name in names if is_folder(path / name)]
    if splits := [name for name in folders if split_of(name.lower())]:
        return f"it holds splits of a data set; give one of them: {printable(str(path / splits[0]))}"
    if packed := [name for name in names if name.lower().endswith(_PACKED)]:
        return f"{printable(packed[0])} is packed; unpack it"
    if lists := [name for name in names if name.lower().endswith(_LISTS)]:
        return (
            f"{printable(lists[0])} is not read; write captions.jsonl, a line for each image such as "
            '{"file_name": "a.png", "caption": "a cat"}'
        )
    if any(is_image(name) for name in names):
        return "its images have no captions; write captions.jsonl or a text (.txt) beside each, or sort them by class"
    return _CHOOSE


def _on_one_line(message: str) -> str:
    """Return a message on one line, since names of folders may hold anything but "/"."""
    return "".join(letter if letter.isprintable() else printable(letter) for letter in message)
