"""The folders and files of checkpoints: how to tell a whole one from a half-written one, and the record of its files.

The record has each file's size and checksum, and a checksum of its own. Nothing here needs torch or Megatron.

    <run>/checkpoints/iter_0000060/            Megatron's distributed checkpoint
    <run>/checkpoints/iter_0000060/checkpoint.json   its summary, with size and checksum of every file
    <run>/checkpoints/iter_0000060/huggingface/      files from Hugging Face: config, tokenizer, ...
    <run>/checkpoints/iter_0000060/huggingface_parts/  tensors from Hugging Face outside of the decoder
    <run>/checkpoints/latest_checkpointed_iteration.txt

A checkpoint is written under a hidden name, flushed to disk, and renamed when it is complete. The latest-file is
updated last.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import xxhash

from megatron_cca.errors import UserError
from megatron_cca.io.external_files import is_below

LATEST = "latest_checkpointed_iteration.txt"
SUMMARY = "checkpoint.json"
FOLDER = "checkpoints"
COMPANION_FILES, COMPANION_TENSORS = "huggingface", "huggingface_parts"
_THREADS = 4
_BLOCK = 4 * 2**20
_SEAL = "checksum"


def iteration_folder(root: Path, iteration: int) -> Path:
    """Return the folder of a checkpoint below ``root``, with Megatron's name for it."""
    return root / f"iter_{iteration:07d}"


def partial_folder(root: Path, iteration: int) -> Path:
    """Return the hidden folder in which a checkpoint is written until it is whole."""
    return root / f".iter_{iteration:07d}.partial"


def own_names(root: Path, iteration: int) -> set[str]:
    """Return every name below ``root`` that a finished or interrupted save of this iteration can leave."""
    folders = (iteration_folder(root, iteration), partial_folder(root, iteration), _former_folder(root, iteration))
    return {LATEST, f".{LATEST}", *(folder.name for folder in folders)}


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder looks like a checkpoint of this package. Looks only for the summary file."""
    return (folder / SUMMARY).is_file()


def resolve(path: str | Path, key: str) -> Path:
    """Return the checkpoint folder for a run folder, its ``checkpoints`` folder, or an ``iter_`` folder.

    Args:
        path: the path that the user gave.
        key: the configuration key that it came from, for messages.

    Raises:
        UserError: there is nothing, or no whole checkpoint. Names the folder or file.
    """
    given = Path(path)
    for root in (given / FOLDER, given):
        iteration = latest_iteration(root)
        if iteration is not None:
            folder = iteration_folder(root, iteration)
            break
        if iterations(root):
            raise UserError(f"{key}: {root} has no {LATEST}; give one of the iter_ folders in it")
    else:
        folder = given
    read_summary(folder, key)
    return folder


def read_summary(folder: Path, key: str) -> dict:
    """Read a checkpoint's summary, and check that every file in it exists in full size.

    :func:`integrity.check_whole` checks the content of the files.

    Raises:
        UserError: the checkpoint is missing, half-written or truncated. Names the folder or file.
    """
    if not folder.is_dir():
        raise UserError(f"{key}: no checkpoint at {folder}; give a run folder or an iter_ folder")
    path = folder / SUMMARY
    if not is_checkpoint(folder):
        raise UserError(f"{key}: {folder} has no {SUMMARY}: it is half-written or not a checkpoint; choose another")
    try:
        summary = unsealed(path.read_text())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{key}: {path} is damaged; choose another checkpoint") from None
    for name, record in summary["files"].items():
        if not is_below(folder, name):
            raise UserError(f"{key}: {path} names {name!r}, which is no file of it; choose another checkpoint")
        _check_size(folder / name, record["bytes"], key)
    return summary


def iterations(root: Path) -> list[int]:
    """Return the iterations of all folders with a checkpoint's name, whole or not, in ascending order."""
    found = [re.fullmatch(r"iter_([0-9]{7,12})", path.name) for path in root.glob("iter_*")]
    return sorted(int(match[1]) for match in found if match)


def latest_iteration(root: Path) -> int | None:
    """Return the iteration in the latest-file, or None if there is no such file.

    Raises:
        UserError: the file does not hold an iteration number.
    """
    marker = root / LATEST
    if not marker.is_file():
        return None
    text = marker.read_text(errors="replace").strip()
    if not re.fullmatch(r"[0-9]{1,12}", text):
        raise UserError(f"{marker}: holds {text[:40]!r} instead of an iteration number")
    return int(text)


def newest_complete(root: Path) -> int | None:
    """Return the newest iteration whose files all exist in full size, or None. Does not check their content."""
    return next((number for number in reversed(iterations(root)) if _is_complete(iteration_folder(root, number))), None)


def finalize(
    partial: Path, root: Path, iteration: int, summary: dict, checksums: Mapping[str, str] | None = None
) -> None:
    """Turn a written folder into the newest checkpoint: record its files, flush, rename, update the latest-file.

    Args:
        partial: the written folder. It replaces a folder of the final name.
        root: the folder of all checkpoints.
        iteration: number of completed steps.
        summary: plain data to keep in ``checkpoint.json``.
        checksums: known checksums, by file name. Other files are hashed now.
    """
    files = file_records(partial, checksums or {})
    (partial / SUMMARY).write_text(sealed({**summary, "iteration": iteration, "files": files}))
    flush_tree(partial)
    final, former = iteration_folder(root, iteration), _former_folder(root, iteration)
    shutil.rmtree(former, ignore_errors=True)
    if final.exists():
        final.rename(former)
    try:
        partial.rename(final)
    except BaseException:
        if former.exists():
            former.rename(final)
        raise
    flush(root)
    marker = root / f".{LATEST}"
    marker.write_text(f"{iteration}\n")
    flush(marker)
    marker.replace(root / LATEST)
    flush(root)
    shutil.rmtree(former, ignore_errors=True)


def tidy(root: Path) -> None:
    """Remove what interrupted saves left, and restore a checkpoint that one of them was about to replace."""
    for former in root.glob(".iter_*.former"):
        final = root / former.name.removeprefix(".").removesuffix(".former")
        if not final.exists():
            former.rename(final)
    for ending in ("former", "partial", "removed"):
        for folder in root.glob(f".iter_*.{ending}"):
            shutil.rmtree(folder, ignore_errors=True)


def prune(root: Path, newest: int, keep_last: int | None, keep_every: int | None) -> list[int]:
    """Remove old checkpoints and return their iterations.

    Args:
        root: the folder of all checkpoints.
        newest: iteration of the checkpoint just saved. Newer ones are damaged: they stay, and do not count.
        keep_last: number of newest checkpoints to keep. None keeps all.
        keep_every: also keep the multiples of this iteration.
    """
    if keep_last is None:
        return []
    own = [number for number in iterations(root) if number <= newest]
    removed = [number for number in own[:-keep_last] if keep_every is None or number % keep_every]
    for number in removed:
        # Rename first, so that a half-removed folder does not look like a checkpoint.
        hidden = _removed_folder(root, number)
        iteration_folder(root, number).rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)
    return removed


def keep_companions(root: Path, start: Path | None, checkpoint: Path) -> dict[str, str]:
    """Add the files that the run keeps from Hugging Face to a checkpoint, as hard links where possible.

    They come from the run's newest checkpoint, else from ``start``. So ``start`` may be deleted once the run has a
    checkpoint. If both are gone, the checkpoint is saved without these files.

    Returns:
        The recorded checksums of these files, by name. A new checksum would hide damage that happened meanwhile.
    """
    origins = [iteration_folder(root, number) for number in reversed(iterations(root))]
    origins += [] if start is None else [start]
    origin = next((folder for folder in origins if (folder / COMPANION_FILES).is_dir() and _is_complete(folder)), None)
    if origin is None:
        return {}
    for name in (COMPANION_FILES, COMPANION_TENSORS):
        for path in (origin / name).glob("*"):
            (checkpoint / name).mkdir(exist_ok=True)
            try:
                (checkpoint / name / path.name).hardlink_to(path)
            except OSError:
                shutil.copyfile(path, checkpoint / name / path.name)
    recorded = read_summary(origin, "checkpoint")["files"]
    kept = {name for name in recorded if name.startswith((f"{COMPANION_FILES}/", f"{COMPANION_TENSORS}/"))}
    return {name: recorded[name]["xxh3"] for name in kept if (checkpoint / name).is_file()}


def file_records(folder: Path, known: Mapping[str, str]) -> dict[str, dict]:
    """Return size and checksum of every file below ``folder``, by name.

    Args:
        folder: folder of a checkpoint that is being written.
        known: checksums that are already computed, by name.
    """
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    sums = {**checksums(folder, [name for name in names if name not in known]), **known}
    return {name: {"bytes": (folder / name).stat().st_size, "xxh3": sums[name]} for name in names}


def checksums(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the checksum of each named file below ``folder``, by name."""
    names = list(names)
    with ThreadPoolExecutor(_THREADS) as threads:
        return dict(zip(names, threads.map(lambda name: checksum(folder / name), names), strict=True))


def checksum(path: Path) -> str:
    """Return the XXH3-128 hash of a file's content. It detects damage, not forgery."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


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


def _seal(summary: dict) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(summary, sort_keys=True).encode())


def _former_folder(root: Path, iteration: int) -> Path:
    return root / f".iter_{iteration:07d}.former"


def _removed_folder(root: Path, iteration: int) -> Path:
    return root / f".iter_{iteration:07d}.removed"


def _is_complete(folder: Path) -> bool:
    try:
        read_summary(folder, "")
    except UserError:
        return False
    return True


def _check_size(file: Path, size: int, key: str) -> None:
    if not os.path.isfile(file):  # noqa: PTH113 - Path.is_file raises for names that no file can have
        raise UserError(f"{key}: {file} is missing: the checkpoint is incomplete; choose another")
    if file.stat().st_size != size:
        raise UserError(
            f"{key}: {file} has {file.stat().st_size} bytes instead of {size}: it is truncated; choose another"
        )
