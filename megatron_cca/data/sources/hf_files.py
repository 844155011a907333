"""Opens a folder with Hugging Face's ``datasets``: no code of its own is run, no network used.

Which files hold the data is decided here, from what lies in the folder: its README could name any file or address.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from megatron_cca.data.sources.files import is_file, own_file
from megatron_cca.data.sources.texts import printable
from megatron_cca.data.sources.trees import walked
from megatron_cca.errors import SurroundingsError, UserError
from megatron_cca.surroundings import check_cache, surroundings_fault

if TYPE_CHECKING:
    from datasets import Dataset

SAVED = ("dataset_info.json", "state.json")
SAVED_SPLITS = "dataset_dict.json"
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_DEFAULT_SPLIT = "train"
_CACHE = "HF_DATASETS_CACHE"
_SHARD = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}")
# The words by which ``datasets`` tells splits, in a folder's or file's name.
_SPLIT_WORDS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "dev", "val"},
    "test": {"test", "testing", "eval", "evaluation"},
}
_BETWEEN_WORDS = re.compile(r"[-._ 0-9]+")


def is_saved(folder: Path) -> bool:
    """Whether it was written by ``save_to_disk``."""
    return is_file(folder / SAVED_SPLITS) or all(is_file(folder / name) for name in SAVED)


def open_folder(root: Path, split: str | None) -> tuple[Dataset, str]:
    """The data of one split, and the split's name. Parquet is unpacked into the cache of ``datasets`` on first use.

    Args:
        root: a result of :func:`~megatron_cca.data.sources.files.real_folder`.
        split: None: the only one, or "train".

    Raises:
        UserError: no data, no such split, several without "train", or what ``datasets`` says.
        SurroundingsError: the cache cannot be written.
    """
    _refuse_chain(root)
    with _refusing(root), _quiet():
        found = _open_saved(root, split) if is_saved(root) else _open_files(root, split)
        # pyarrow follows offsets wherever they lead, which ends the process; once they are checked they stay inside.
        found[0].data.validate(full=True)
        return found


def _refuse_chain(path: Path) -> None:
    """To the file systems of ``datasets``, "::" joins addresses."""
    if "::" in str(path):
        raise UserError(f'{printable(str(path))} has "::" in its name, which datasets cannot open; rename it')


def _open_saved(root: Path, split: str | None) -> tuple[Dataset, str]:
    from datasets import Dataset

    folder = ""
    if is_file(root / SAVED_SPLITS):
        folder = _chosen(_json(root, SAVED_SPLITS)["splits"], split, root)
    elif split is not None:
        raise UserError(f"split: {printable(str(root))} has no splits; leave it out")
    for file in SAVED:
        own_file(root, f"{folder}/{file}".lstrip("/"))
    for file in _json(root, f"{folder}/{SAVED[1]}".lstrip("/"))["_data_files"]:
        own_file(root, f"{folder}/{file['filename']}".lstrip("/"))
    return Dataset.load_from_disk(str(root / folder)).with_format(None), folder or _DEFAULT_SPLIT


def _json(root: Path, name: str) -> dict:
    return json.loads(own_file(root, name).read_bytes())


def _open_files(root: Path, split: str | None) -> tuple[Dataset, str]:
    from datasets import load_dataset
    from datasets.data_files import DataFilesList

    check_cache(_CACHE)
    builder, files = data_files(root)
    splits = _splits(files)
    name = _chosen(list(splits), split, root)
    paths = [own_file(root, file) for file in splits[name]]
    for path in paths:
        _refuse_chain(path)
    # Not as patterns, which every bracket in a folder's name would change; the cache is keyed by sizes and times.
    times = [(str(path.stat().st_size), str(path.stat().st_mtime_ns)) for path in paths]
    found = DataFilesList([str(path) for path in paths], times)
    return load_dataset(builder, data_files={_DEFAULT_SPLIT: found}, split=_DEFAULT_SPLIT), name


def data_files(root: Path) -> tuple[str, list[str]]:
    """The builder of ``datasets`` for a folder and the files that it is given, in order.

    Raises:
        UserError: nothing that it could read.
    """
    files = sorted(walked(root), key=os.fsencode)
    if metadata := [file for file in files if PurePosixPath(file).name in METADATA]:
        return "imagefolder", metadata
    for builder in ("parquet", "arrow"):
        if found := [file for file in files if file.endswith(f".{builder}")]:
            return builder, found
    raise UserError(f"{printable(str(root))} has no .parquet or .arrow files and no {', '.join(METADATA)}")


def _splits(files: list[str]) -> dict[str, list[str]]:
    """The files of each split; all are of "train" where no name says anything."""
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
    for part in path.parts:
        words = set(_BETWEEN_WORDS.split(part))
        for split, known in _SPLIT_WORDS.items():
            if words & known:
                return split
    return ""


def _chosen(splits: list[str], split: str | None, root: Path) -> str:
    """``split`` or the default one.

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
def _refusing(root: Path) -> Iterator[None]:
    try:
        yield
    except (SurroundingsError, UserError):
        raise
    # Foreign files under a large library: nearly anything can be raised.
    except Exception as error:
        fault = surroundings_fault(error, _CACHE)
        if fault is not None:
            raise fault from None
        cause = error.__cause__ or error
        said = str(cause).strip().splitlines() or [""]
        raise UserError(
            f"{printable(str(root))} cannot be opened by datasets ({type(cause).__name__}: {printable(said[0])}); "
            "repair it or save it again"
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars where nobody watches."""
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
