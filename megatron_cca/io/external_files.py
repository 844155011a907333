"""Read files that somebody else may have written: the names of other files in them, JSON lines, an array."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_cca.errors import UserError, shortened
from megatron_cca.io.paths import LONGEST_NAME


def hub_blobs(folder: str | os.PathLike) -> Path | None:
    """Return where the hub's cache keeps the contents of a snapshot. The files of a snapshot are links to there.

    Args:
        folder: ``.../snapshots/REVISION``, or a folder in it, without symbolic links.

    Returns:
        ``blobs`` beside ``snapshots``. None for any other folder.
    """
    for revision in (Path(folder), *Path(folder).parents):
        blobs = revision.parent.parent / "blobs"
        if revision.parent.name == "snapshots" and os.path.isdir(blobs):  # noqa: PTH112 - never raises
            return Path(os.path.realpath(blobs))
    return None


def is_file_name(name: object) -> bool:
    """Return whether something found in a file may be the name of another file in the same folder."""
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\0" in name:
        return False
    try:
        return len(os.fsencode(name)) <= LONGEST_NAME
    except UnicodeEncodeError:
        return False


def sha256(path: Path) -> str:
    """Return the sha256 of a file's contents, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_below(folder: Path, name: object) -> Path:
    """Return the path of a file whose name was found inside a folder.

    Args:
        folder: named by the user. It may be a symbolic link itself.
        name: foreign input, relative to the folder.

    Raises:
        UserError: no text, an absolute name, one that leaves the folder by ".." or by a symbolic link, or no such file.
    """
    if not isinstance(name, str) or not is_below(folder, name):
        reason = "; names are relative to it" if isinstance(name, str) and Path(name).is_absolute() else ""
        raise UserError(f"{shortened(repr(name), 80)} is not a file of {folder}{reason}")
    path = folder / name
    if not os.path.isfile(path):  # noqa: PTH113 - Path.is_file raises for names that no file can have
        raise UserError(f"{shortened(name, 80)} is missing in {folder}")
    return path


def is_below(folder: Path, name: str) -> bool:
    """Return whether a name stays in a folder: relative, without a ".." or a symbolic link that leads out of it.

    In a snapshot of the hub's cache, a link may also lead into the cache's contents.
    """
    try:
        target, real = os.path.realpath(folder / name), os.path.realpath(folder)
    except (OSError, ValueError):
        return False
    places = [f"{place}/".replace("//", "/") for place in (real, hub_blobs(real)) if place is not None]
    return not Path(name).is_absolute() and target.startswith(tuple(places))


def json_lines(path: Path, **required: type) -> Iterator[tuple[str, dict]]:
    """Yield the complete lines of a log and the objects in them. A killed run may leave half of its last line.

    Args:
        path: the file. If it is missing, there are no lines.
        required: keys that every object has, with their types.

    Raises:
        UserError: a line that holds something else; names it.
    """
    lines = path.read_text(errors="replace").split("\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or any(type(row.get(key)) is not kind for key, kind in required.items()):
            raise UserError(f"{path}: line {number} is damaged; remove it, or move the file away")
        yield f"{line}\n", row


def mapped_array(path: Path) -> np.ndarray:
    """Return the array in an ``.npy`` file, as a read-only memory map.

    Raises:
        UserError: a damaged file, or one that holds something else. The message does not name it.
    """
    try:
        # numpy refuses to map an array that is longer than the file.
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    # numpy promises no closed set for damaged headers.
    except Exception as error:
        raise UserError(f"cannot be read as .npy ({reason_of(error)})") from None
    if not isinstance(found, np.ndarray):
        raise UserError("holds something else than one array")
    return found


def reason_of(error: Exception) -> str:
    """Return the message of an error of another library on one line, or the error's class."""
    return " ".join(str(error).split()) or type(error).__name__
