"""Open a folder with Hugging Face's ``datasets``, without running code from it and without network access.

The files of the data are chosen here, from the contents of the folder. Its README could name any file or address.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from megatron_cca.data.sources.external_text import printable, split_of
from megatron_cca.data.sources.folders import (
    Root,
    UnreadFiles,
    checked_file,
    is_file,
    is_image,
    opened_below,
    walk_files,
)
from megatron_cca.errors import SurroundingsError, UserError
from megatron_cca.io.paths import check_cache, surroundings_fault

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

SAVED = ("dataset_info.json", "state.json")
SAVED_SPLITS = "dataset_dict.json"
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
# Kinds by their first bytes. Metadata may also be plain text.
KINDS = ("a Parquet file", "an Arrow file")
_DEFAULT_SPLIT = "train"
_PARQUET = b"PAR1"
_CACHE = "HF_DATASETS_CACHE"
_SHARD = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}")


def is_saved(folder: Path) -> bool:
    """Return whether ``save_to_disk`` wrote the folder."""
    return is_file(folder / SAVED_SPLITS) or all(is_file(folder / name) for name in SAVED)


@dataclass(frozen=True)
class Opened:
    """The data of one split.

    Attributes:
        dataset: its rows.
        split: its name.
        notices: see :class:`~megatron_cca.data.sources.source_protocol.Source`.
        lists_images: whether the data are a list of images in the folder.
    """

    dataset: Dataset
    split: str
    notices: tuple[str, ...]
    lists_images: bool = False


def open_folder(root: Root, split: str | None) -> Opened:
    """Open the data of one split. Parquet is unpacked into the cache of ``datasets`` on first use.

    Args:
        root: a result of :func:`~megatron_cca.data.sources.folders.real_folder`.
        split: its name. None means the only one, or "train".

    Raises:
        UserError: no data, no such split, several without "train", a file of another kind, or an error of ``datasets``.
        SurroundingsError: the cache cannot be written.
    """
    _refuse_chain(root.path)
    with _refusing(root), _quiet():
        found = _open_saved(root, split) if is_saved(root.path) else _open_files(root, split)
        # pyarrow does not check offsets. Wrong ones would end the process, so they are checked here.
        found.dataset.data.validate(full=True)
        return found


def stored_schema(root: Root, split: str | None) -> pyarrow.Schema | None:
    """Return the columns of a split and their types, from the head of its first file. None where they cannot be read.

    Opening the split says why.
    """
    import pyarrow.ipc
    import pyarrow.parquet

    try:
        with opened_below(root, _first_file(root, split), "") as file:
            if file.read(len(_PARQUET)) == _PARQUET:
                return pyarrow.parquet.read_schema(file)
            file.seek(0)
            return pyarrow.ipc.open_stream(file).schema
    # A large library reads untrusted files: it can raise nearly anything.
    except Exception:
        return None


def _first_file(root: Root, split: str | None) -> str:
    if not is_saved(root.path):
        splits = _splits(data_files(root)[1])
        return splits[_chosen(list(splits), split, root)][0]
    folder = _chosen(_json(root, SAVED_SPLITS)["splits"], split, root) + "/" if is_file(root / SAVED_SPLITS) else ""
    return folder + _json(root, folder + SAVED[1])["_data_files"][0]["filename"]


def _refuse_chain(path: Path) -> None:
    """Refuse a path with "::", which joins addresses in the file systems of ``datasets``."""
    if "::" in str(path):
        raise UserError(f'{printable(str(path))} has "::" in its name, which datasets cannot open; rename it')


def _open_saved(root: Root, split: str | None) -> Opened:
    from datasets import Dataset

    folder, notices = "", ()
    if is_file(root / SAVED_SPLITS):
        splits = _json(root, SAVED_SPLITS)["splits"]
        folder = _chosen(splits, split, root)
        notices = _other_splits(splits, folder)
    elif split is not None:
        raise UserError(f"split: {printable(str(root))} has no splits; leave it out")
    for file in SAVED:
        checked_file(root, f"{folder}/{file}".lstrip("/"))
    for file in _json(root, f"{folder}/{SAVED[1]}".lstrip("/"))["_data_files"]:
        checked_file(root, f"{folder}/{file['filename']}".lstrip("/"), KINDS)
    return Opened(Dataset.load_from_disk(str(root / folder)).with_format(None), folder or _DEFAULT_SPLIT, notices)


def _json(root: Root, name: str) -> dict:
    return json.loads(checked_file(root, name).read_bytes())


def _open_files(root: Root, split: str | None) -> Opened:
    from datasets import load_dataset
    from datasets.data_files import DataFilesList

    check_cache(_CACHE)
    builder, files, unread = data_files(root)
    splits = _splits(files)
    name = _chosen(list(splits), split, root)
    for file in splits[name]:
        _refuse_chain(root / file)
        _refuse_chain(checked_file(root, file, KINDS))
    # The names of links, in the hub's cache, since the names of their contents have neither kind nor folder.
    paths = [root / file for file in splits[name]]
    # Not as patterns, in which a bracket of a folder's name would have a meaning. The cache is keyed by sizes and
    # times.
    times = [(str(path.stat().st_size), str(path.stat().st_mtime_ns)) for path in paths]
    found = DataFilesList([str(path) for path in paths], times)
    dataset = load_dataset(builder, data_files={_DEFAULT_SPLIT: found}, split=_DEFAULT_SPLIT)
    lists_images = builder == "imagefolder"
    notices = (*_other_splits(splits, name), *_several_folders(splits[name], lists_images))
    line = unread.line()
    return Opened(dataset, name, notices + ((line,) if line else ()), lists_images)


def data_files(root: Root) -> tuple[str, list[str], UnreadFiles]:
    """Return the builder of ``datasets`` for a folder, the files for it in order, and the count of unread files.

    Raises:
        UserError: nothing that it could read, or folders in it that ``save_to_disk`` wrote.
    """
    unread = UnreadFiles()
    files = sorted(walk_files(root, unread), key=os.fsencode)
    builder, found = _found(root, files)
    is_list = builder == "imagefolder"
    for file in sorted(set(files) - set(found)):
        # The reader of a list counts the images that it does not name.
        if not (is_list and is_image(file)):
            unread.add(file)
    return builder, found, unread


def _found(root: Root, files: list[str]) -> tuple[str, list[str]]:
    names = {PurePosixPath(file).name for file in files}
    if names & {SAVED_SPLITS, SAVED[1]}:
        inside = next(file for file in files if PurePosixPath(file).name in (SAVED_SPLITS, SAVED[1]))
        folder = PurePosixPath(inside).parent
        raise UserError(
            f"{printable(str(root))} holds folders that save_to_disk wrote; give one: {printable(str(root / folder))}"
        )
    if metadata := [file for file in files if PurePosixPath(file).name in METADATA]:
        return "imagefolder", metadata
    for builder in ("parquet", "arrow"):
        if found := [file for file in files if file.endswith(f".{builder}") and not _is_cached(file)]:
            return builder, found
    raise UserError(f"{printable(str(root))} has no .parquet or .arrow files and no {', '.join(METADATA)}")


def _is_cached(file: str) -> bool:
    """Return whether ``map`` or ``filter`` of ``datasets`` wrote the file. It repeats rows of the data."""
    return PurePosixPath(file).name.startswith("cache-") and file.endswith(".arrow")


def _other_splits(splits: Iterable[str], chosen: str) -> tuple[str, ...]:
    others = ", ".join(sorted(printable(name) for name in splits if name != chosen))
    return (f"split {printable(chosen)} is read, {others} not (--split chooses)",) if others else ()


def _several_folders(files: list[str], lists_images: bool) -> tuple[str, ...]:
    folders = sorted({str(PurePosixPath(file).parent) for file in files})
    if lists_images or len(folders) == 1:
        return ()
    return (f"files of {len(folders)} folders are read as one data set: {', '.join(map(printable, folders[:5]))}",)


def _splits(files: list[str]) -> dict[str, list[str]]:
    """Return the files of each split. All are of "train" where no name has a split."""
    found: dict[str, list[str]] = {}
    for file in files:
        found.setdefault(_split_of(file), []).append(file)
    nameless = found.pop("", [])
    if nameless and found:
        raise UserError(
            f"{printable(nameless[0])} is of no split, {printable(next(iter(found.values()))[0])} is; "
            "name the split in each file or in none"
        )
    return found or {_DEFAULT_SPLIT: nameless}


def _split_of(file: str) -> str:
    path = PurePosixPath(file)
    if shard := _SHARD.match(path.name):
        return shard[1]
    return next((split for part in path.parts if (split := split_of(part))), "")


def _chosen(splits: list[str], split: str | None, root: Root) -> str:
    """Return ``split``, or the default one.

    Raises:
        UserError: there is no such split, or there are several without "train".
    """
    shown = ", ".join(printable(found) for found in sorted(splits))
    if split is None and len(splits) > 1 and _DEFAULT_SPLIT not in splits:
        raise UserError(f"split: {printable(str(root))} has several; choose one of {shown}")
    chosen = split or (_DEFAULT_SPLIT if _DEFAULT_SPLIT in splits else splits[0])
    if chosen not in splits:
        raise UserError(f"split: {printable(str(root))} has no {printable(chosen)!r}; choose one of {shown}")
    return chosen


@contextmanager
def _refusing(root: Root) -> Iterator[None]:
    try:
        yield
    except (SurroundingsError, UserError):
        raise
    # A large library reads untrusted files: it can raise nearly anything.
    except Exception as error:
        fault = surroundings_fault(error, _CACHE)
        if fault is not None:
            raise fault from None
        cause = error.__cause__ or error
        lines = str(cause).strip().splitlines() or [""]
        raise UserError(
            f"{printable(str(root))} cannot be opened by datasets ({type(cause).__name__}: {printable(lines[0])}); "
            "repair it or save it again"
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Switch progress bars off unless standard error is a terminal."""
    import datasets

    watched = sys.stderr.isatty()
    were_on = not datasets.are_progress_bars_disabled()
    if not watched:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if were_on and not watched:
            datasets.enable_progress_bars()
