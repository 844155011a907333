"""Where checkpoints lie, and how to tell a whole one from a half-written one; no torch, no Megatron.

    <run>/checkpoints/iter_0000060/            Megatron's distributed checkpoint
    <run>/checkpoints/iter_0000060/checkpoint.json   what it is, and the size of every file
    <run>/checkpoints/iter_0000060/huggingface/      what came along from Hugging Face: config, tokenizer, ...
    <run>/checkpoints/iter_0000060/huggingface_parts/  and the tensors that are not the decoder's
    <run>/checkpoints/latest_checkpointed_iteration.txt

A checkpoint is written under a hidden name and renamed when complete; the latest-file moves last.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from megatron_cca.errors import UserError

LATEST = "latest_checkpointed_iteration.txt"
SUMMARY = "checkpoint.json"
FOLDER = "checkpoints"
COMPANION_FILES, COMPANION_TENSORS = "huggingface", "huggingface_parts"


def iteration_folder(root: Path, iteration: int) -> Path:
    """Megatron's name of a checkpoint below ``root``."""
    return root / f"iter_{iteration:07d}"


def partial_folder(root: Path, iteration: int) -> Path:
    """Where a checkpoint is written before it is whole."""
    return root / f".iter_{iteration:07d}.partial"


def _former_folder(root: Path, iteration: int) -> Path:
    return root / f".iter_{iteration:07d}.former"


def own_names(root: Path, iteration: int) -> set[str]:
    """Every name that a checkpoint of this iteration, finished or interrupted, may have below ``root``."""
    folders = (iteration_folder(root, iteration), partial_folder(root, iteration), _former_folder(root, iteration))
    return {LATEST, f".{LATEST}", *(folder.name for folder in folders)}


def finalize(partial: Path, root: Path, iteration: int, summary: dict) -> None:
    """Turn a written folder into the newest checkpoint: record its files, rename it, move the latest-file."""
    files = {str(path.relative_to(partial)): path.stat().st_size for path in partial.rglob("*") if path.is_file()}
    (partial / SUMMARY).write_text(json.dumps({**summary, "iteration": iteration, "files": files}, indent=1))
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
    marker = root / f".{LATEST}"
    marker.write_text(f"{iteration}\n")
    marker.replace(root / LATEST)
    shutil.rmtree(former, ignore_errors=True)


def keep_companions(root: Path, start: Path | None, checkpoint: Path) -> None:
    """Give a checkpoint what the run keeps from Hugging Face, by hard links where the file system has them.

    It is taken from the run's newest checkpoint, so that the one it started from may go once there is another; a folder
    that is gone is no reason to lose a checkpoint.
    """
    newest = latest_iteration(root)
    origins = [*([] if newest is None else [iteration_folder(root, newest)]), *([] if start is None else [start])]
    origin = next((folder for folder in origins if (folder / COMPANION_FILES).is_dir()), None)
    if origin is None:
        return
    for name in (COMPANION_FILES, COMPANION_TENSORS):
        for path in (origin / name).glob("*"):
            (checkpoint / name).mkdir(exist_ok=True)
            try:
                (checkpoint / name / path.name).hardlink_to(path)
            except OSError:
                shutil.copyfile(path, checkpoint / name / path.name)


def latest_iteration(root: Path) -> int | None:
    """The newest checkpoint's iteration, or None where nothing was saved yet.

    Raises:
        UserError: an unreadable latest-file.
    """
    marker = root / LATEST
    if not marker.is_file():
        return None
    text = marker.read_text(errors="replace").strip()
    if not re.fullmatch(r"[0-9]{1,12}", text):
        raise UserError(f"{marker}: holds {text[:40]!r} instead of an iteration number")
    return int(text)


def resolve(path: str | Path, key: str) -> Path:
    """The checkpoint folder that a user means by a run folder, its ``checkpoints`` folder, or an ``iter_`` folder.

    Args:
        path: what the user gave.
        key: the configuration key it came from, for messages.

    Raises:
        UserError: nothing there, or not a whole checkpoint; names the folder or file.
    """
    given = Path(path)
    for root in (given / FOLDER, given):
        iteration = latest_iteration(root)
        if iteration is not None:
            folder = iteration_folder(root, iteration)
            break
    else:
        folder = given
    read_summary(folder, key)
    return folder


def read_summary(folder: Path, key: str) -> dict:
    """A checkpoint's summary, after checking that every file it names is there in full.

    Raises:
        UserError: missing, half-written, or truncated; names the folder or file.
    """
    if not folder.is_dir():
        raise UserError(f"{key}: no checkpoint at {folder}; give a run folder or an iter_ folder")
    path = folder / SUMMARY
    if not path.is_file():
        raise UserError(f"{key}: {folder} has no {SUMMARY}: it is half-written or not a checkpoint; choose another")
    try:
        summary = json.loads(path.read_text())
        files = summary["files"].items()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{key}: {path} is damaged; choose another checkpoint") from None
    for name, size in files:
        file = folder / name
        if not file.is_file():
            raise UserError(f"{key}: {file} is missing: the checkpoint is incomplete; choose another")
        if file.stat().st_size != size:
            raise UserError(
                f"{key}: {file} has {file.stat().st_size} bytes instead of {size}: it is truncated; choose another"
            )
    return summary
