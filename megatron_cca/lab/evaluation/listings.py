"""The names of sets of images, the files of a folder, their order, and the annotations beside them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_cca.data.sources.confined_files import real_folder
from megatron_cca.data.sources.foreign_text import printable, split_of
from megatron_cca.data.sources.image_trees import LINKED, UnreadFiles, walk_files
from megatron_cca.errors import UserError, error_context
from megatron_cca.io.external_files import file_below, kind_of_file
from megatron_cca.io.typed_paths import typed_path

PROMPTS = "prompts.jsonl"
SUFFIXES = frozenset({".png", ".jpg", ".jpeg"})
# Words in place of a path: scikit-learn's scans for training, and the others.
DIGITS, HELD_OUT = WORDS = ("digits", "digits-held-out")


@dataclass(frozen=True)
class Listing:
    """The files of a folder.

    ``labels`` int64 ``[N]`` and ``prompts`` exist if each image has one. ``notices`` has one line for each kind of file
    that is not listed.
    """

    folder: Path
    files: list[Path]
    labels: np.ndarray | None = None
    prompts: list[str] | None = None
    notices: tuple[str, ...] = ()


def check_path(path: str | Path) -> None:
    """Refuse a path that cannot be a set of images.

    Nothing is read.

    Raises:
        UserError: names the path and the possible kinds.
    """
    if str(path) in WORDS:
        return
    what = Path(typed_path(str(path)))
    if not what.exists():
        raise UserError(f"{path}: does not exist; give a folder of images, an .npz, {DIGITS} or {HELD_OUT}")
    if what.is_file() and what.suffix.lower() != ".npz":
        raise UserError(f"{path}: is a file, but no .npz; give a folder of images or an .npz")


def list_folder(folder: Path) -> Listing:
    """List the images of a folder.

    Its ``prompts.jsonl`` gives their order. Without one, it lists the folder and one level below, by name.

    Raises:
        UserError: no images; a damaged line of ``prompts.jsonl`` or one that names a missing file; labels or prompts
            for only some of the images.
    """
    if (folder / PROMPTS).is_file():
        return _listed(folder)
    files = [
        file
        for pattern in ("*", "*/*")
        for file in folder.glob(pattern)
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()
    ]
    notices = _passed_over(folder)
    if not files:
        found = "".join(f"; {line}" for line in notices)
        raise UserError(f"{folder}: holds no PNG or JPEG files, neither there nor one level below{found}")
    return Listing(folder, sorted(files), notices=notices)


def _passed_over(folder: Path) -> tuple[str, ...]:
    """Return notices about files of a folder that are not in the set.

    It does not enter folders that are links.
    """
    found, deeper, unread = [], [], UnreadFiles()
    for name in walk_files(real_folder(folder), unread, strict=False):
        if name.endswith("/"):
            # One level below, links count as folders.
            if name.count("/") > 1:
                unread.add(name, LINKED)
        elif Path(name).suffix.lower() not in SUFFIXES:
            unread.add(name)
        elif name.count("/") > 1:
            deeper.append(name)
        else:
            found.append(name)
    splits = sorted(
        {name.partition("/")[0] for name in found if name.count("/") == 1 and split_of(name.partition("/")[0])}
    )
    together = f"{' and '.join(map(printable, splits))} are taken together as one set" if len(splits) > 1 else ""
    line = unread.line()
    below = (
        f"{len(deeper)} images lie deeper than one level and are not read ({printable(min(deeper))})" if deeper else ""
    )
    return tuple(notice for notice in (together, below, line) if notice)


def _not_listed(files: list[Path]) -> tuple[str, ...]:
    """Return notices about files that a list does not name, and about files that it names twice."""
    named = {os.path.realpath(file) for file in files}
    there = {
        os.path.realpath(file)
        for folder in sorted({file.parent for file in files})
        for file in folder.iterdir()
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
    }
    again, others = len(files) - len(named), sorted(there - named)
    return (
        *((f"{again} lines name an image again, which counts again",) if again else ()),
        *((f"{len(others)} images are not in {PROMPTS} and are not read ({printable(others[0])})",) if others else ()),
    )


def _listed(folder: Path) -> Listing:
    files, labels, prompts = [], [], []
    if (kind := kind_of_file(folder / PROMPTS)) is not None:
        raise UserError(f"{folder / PROMPTS}: is {kind}; it must hold one JSON object a line, in UTF-8")
    for number, line in enumerate((folder / PROMPTS).read_bytes().split(b"\n"), 1):
        if line.strip():
            with error_context(f"{folder / PROMPTS}: line {number}"):
                record = _record(line)
                files.append(file_below(folder, record["file"]))
            labels.append(record.get("label"))
            prompts.append(record.get("prompt"))
    if not files:
        raise UserError(f"{folder / PROMPTS}: lists no images")
    for name, values in (("label", labels), ("prompt", prompts)):
        known = sum(value is not None for value in values)
        if known not in (0, len(values)):
            raise UserError(
                f"{folder / PROMPTS}: {known} of {len(values)} images have a {name}; give it for all or none"
            )
    return Listing(
        folder,
        files,
        np.array(labels, dtype=np.int64) if labels[0] is not None else None,
        prompts if prompts[0] is not None else None,
        _not_listed(files),
    )


def _record(line: bytes) -> dict:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError("is not valid JSON") from None
    if not isinstance(record, dict) or not isinstance(record.get("file"), str):
        raise UserError('must be an object with "file"')
    label, prompt = record.get("label"), record.get("prompt")
    if label is not None and (isinstance(label, bool) or not isinstance(label, int) or not -(2**63) <= label < 2**63):
        raise UserError(f'"label" must be a whole number of 64 bits or null, found {label!r}')
    if prompt is not None and not isinstance(prompt, str):
        raise UserError(f'"prompt" must be a string or null, found {prompt!r}')
    return record
