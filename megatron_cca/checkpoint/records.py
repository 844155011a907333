"""The record of a checkpoint's files: their sizes and checksums. The record has a checksum of its own."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import xxhash

_THREADS = 4
_BLOCK = 4 * 2**20
_SEAL = "checksum"


def checksum(path: Path) -> str:
    """Return the XXH3-128 hash of a file's content. It detects damage, not forgery."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def checksums(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the checksum of each named file below ``folder``, by name."""
    names = list(names)
    with ThreadPoolExecutor(_THREADS) as threads:
        return dict(zip(names, threads.map(lambda name: checksum(folder / name), names), strict=True))


def file_records(folder: Path, known: Mapping[str, str]) -> dict[str, dict]:
    """Return size and checksum of every file below ``folder``, by name.

    Args:
        folder: folder of a checkpoint that is being written.
        known: checksums that are already computed, by name.
    """
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    sums = {**checksums(folder, [name for name in names if name not in known]), **known}
    return {name: {"bytes": (folder / name).stat().st_size, "xxh3": sums[name]} for name in names}


def sealed(summary: dict) -> str:
    """Return a summary as text that contains its own checksum."""
    return json.dumps({**summary, _SEAL: _seal(summary)}, indent=1)


def unsealed(text: str) -> dict:
    """Return the summary from a text that :func:`sealed` made.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, RecursionError: the text is not from :func:`sealed`.
    """
    summary = json.loads(text)
    if summary.pop(_SEAL) != _seal(summary):
        raise ValueError("its checksum does not fit")
    for name, record in summary["files"].items():
        if not (isinstance(record["bytes"], int) and isinstance(record["xxh3"], str)):
            raise TypeError("files must have sizes and checksums")
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ValueError(f"file {name!r} is outside of the checkpoint")
    return summary


def _seal(summary: dict) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(summary, sort_keys=True).encode())


def flush_tree(folder: Path) -> None:
    """Flush all files and folders below ``folder`` to the disk."""
    for path in [*folder.rglob("*"), folder]:
        flush(path)


def flush(path: Path) -> None:
    """Flush the content of one file, or the names in one folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_system_cause(error: BaseException) -> BaseException:
    """Return the file system's error, or the interruption, that torch's zip writer hides behind its own error."""
    found: BaseException | None = error
    while found is not None and isinstance(found, Exception) and not isinstance(found, OSError):
        found = found.__context__
    return found or error
