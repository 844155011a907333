"""Where images with captions come from: one file for each way in which they lie on a disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from megatron_cca.data.sources import captions, classes, emu3, huggingface, journeydb, llamagen, webdataset
from megatron_cca.data.sources.files import is_file, is_folder
from megatron_cca.data.sources.records import Record, Source, SourceOptions, Unreadable
from megatron_cca.data.sources.texts import printable
from megatron_cca.errors import UserError

__all__ = ["AUTO", "DEFAULTS", "LAYOUTS", "Layout", "Record", "Source", "SourceOptions", "Unreadable", "open_source"]

AUTO = "auto"
DEFAULTS = SourceOptions()


@dataclass(frozen=True)
class Layout:
    """One way in which images and captions lie on a disk.

    Attributes:
        recognises: whether a path has this layout, by a short look.
        opens: makes the source of a path; raises UserError.
        options: the fields of :class:`SourceOptions` that mean something to it.
    """

    recognises: Callable[[Path], bool]
    opens: Callable[[Path, SourceOptions], Source]
    options: frozenset[str] = frozenset()


LAYOUTS: dict[str, Layout] = {
    "captions": Layout(captions.recognises, captions.open_captions, frozenset({"caption_field"})),
    "classes": Layout(classes.recognises, classes.open_classes),
    "journeydb": Layout(journeydb.recognises, journeydb.open_journeydb, frozenset({"caption_field", "split"})),
    "webdataset": Layout(webdataset.recognises, webdataset.open_webdataset, frozenset({"caption_field"})),
    "datasets": Layout(
        huggingface.recognises, huggingface.open_huggingface, frozenset({"caption_field", "image_field", "split"})
    ),
    "emu3": Layout(emu3.recognises, emu3.open_emu3),
    "llamagen": Layout(llamagen.recognises, llamagen.open_llamagen),
}


def open_source(path: Path, layout: str = AUTO, options: SourceOptions = DEFAULTS) -> Source:
    """The images and captions that lie at a path.

    Args:
        path: a folder; for webdataset also a tar, for emu3 also a list. Nothing outside it is read, but for the
            folder that a list of Emu3's names.
        layout: a key of :data:`LAYOUTS`, or "auto".
        options: what the layout's defaults leave open.

    Raises:
        UserError: nothing there, nothing in it, an unknown or unrecognisable layout, an option that means nothing to
            it, or what the layout refuses.
    """
    path = Path(path)
    if layout not in (AUTO, *LAYOUTS):
        raise UserError(f"layout: {printable(layout)!r} is unknown; choose one of {', '.join((AUTO, *LAYOUTS))}")
    _check_path(path)
    if layout == AUTO:
        layout = _recognised(path)
    for option in fields(options):
        if getattr(options, option.name) is not None and option.name not in LAYOUTS[layout].options:
            raise UserError(f"{option.name}: means nothing to the layout {layout}; leave it out")
    try:
        return LAYOUTS[layout].opens(path, options)
    except UserError as error:
        raise UserError(f"layout {layout}: {_on_one_line(str(error))}") from None


def _check_path(path: Path) -> None:
    shown = printable(str(path))
    if not is_file(path) and not is_folder(path):
        raise UserError(f"{shown} does not exist; give a folder with images")
    if not os.access(path, os.R_OK | (os.X_OK if is_folder(path) else 0), effective_ids=True):
        raise UserError(f"{shown} may not be read; change its permissions")


def _recognised(path: Path) -> str:
    found = [name for name, layout in LAYOUTS.items() if layout.recognises(path)]
    if len(found) > 1:
        # Images in sub-folders are classes only where no list beside them says otherwise.
        found = [name for name in found if name != "classes"]
    if len(found) != 1:
        what = f"could be {' or '.join(found)}" if found else "has no layout known here"
        raise UserError(f"{printable(str(path))} {what}; set the layout to one of {', '.join(LAYOUTS)}")
    return found[0]


def _on_one_line(message: str) -> str:
    """Names of folders may hold anything but "/"."""
    return "".join(letter if letter.isprintable() else printable(letter) for letter in message)
