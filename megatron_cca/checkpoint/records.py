"""What a checkpoint records of its files: sizes and checksums, sealed with a checksum too, and flushed to the disk."""

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
    """The XXH3-128 of a file's content: it finds damage, not forgery."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def checksums(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The checksum of each named file below ``folder``."""
    names = list(names)
    with ThreadPoolExecutor(_THREADS) as threads:
        return dict(zip(names, threads.map(lambda name: checksum(folder / name), names), strict=True))


def file_records(folder: Path, known: Mapping[str, str]) -> dict[str, dict]:
    """Size and checksum of every file below ``folder``, by name.

    Args:
        folder: of a checkpoint that is being written.
        known: checksums that need not be computed again.
    """
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    sums = {**checksums(folder, [name for name in names if name not in known]), **known}
    return {name: {"bytes": (folder / name).stat().st_size, "xxh3": sums[name]} for name in names}


def sealed(summary: dict) -> str:
    """A summary as text that carries its own checksum."""
    return json.dumps({**summary, _SEAL: _seal(summary)}, indent=1)


def unsealed(text: str) -> dict:
    """The summary in a sealed text.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, RecursionError: not what :func:`sealed` wrote.
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
    """Have everything below ``folder`` on the disk, names included, before this returns."""
    for path in [*folder.rglob("*"), folder]:
        flush(path)


def flush(path: Path) -> None:
    """Have one file's content, or one folder's names, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_system_cause(error: BaseException) -> BaseException:
    """What the file system said, or an interruption, where torch's zip writer has put an error of its own on top."""
    found: BaseException | None = error
    while found is not None and isinstance(found, Exception) and not isinstance(found, OSError):
        found = found.__context__
    return found or error
