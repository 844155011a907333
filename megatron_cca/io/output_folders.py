"""Write a folder of results: lock it, replace nothing unasked, and show nothing half-done."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from megatron_cca.errors import UserError
from megatron_cca.io.outputs import OPTION, file_system_errors


def check_output(output: Path, former: Collection[str], unfinished: Collection[str], *, overwrite: bool) -> None:
    """Refuse a claimed folder that holds something that must not be replaced.

    Args:
        output: the folder that the user named.
        former: names of what a former output of the same kind consists of. Only these may be replaced.
        unfinished: names that an interrupted attempt may have left. They do not count.
        overwrite: whether the user allows replacing.

    Raises:
        UserError: names the folder and what it holds.
    """
    found = {path.name for path in output.iterdir()} - {*unfinished}
    names = sorted(found, key=lambda name: (name.startswith("."), name))
    if names and not overwrite:
        raise UserError(f"{OPTION}: {output} already holds {_some(names)}; give an empty folder or --overwrite")
    foreign = [name for name in names if name not in former]
    if foreign:
        raise UserError(
            f"{OPTION}: {output} holds {_some(foreign)}: not what --overwrite is meant to replace; give another folder"
        )


def check_apart(output: Path, source: Path, option: str, output_option: str = OPTION) -> None:
    """Refuse an output that is the folder that is read, contains it, or lies in it."""
    inner, outer = output.resolve(), source.resolve()
    if inner == outer or inner.is_relative_to(outer) or outer.is_relative_to(inner):
        raise UserError(f"{output_option}: {output} and {option} {source} are in each other's way; give another folder")


def remove_beside_others(folder: Path) -> None:
    """Remove a folder of which other processes may remove parts at the same time."""

    def not_missing(function, path, error: BaseException) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    shutil.rmtree(folder, onexc=not_missing)


@contextmanager
def claimed(output: Path, option: str = OPTION) -> Iterator[None]:
    """Lock a folder against other processes inside the block. The folder is made if missing, and removed if left empty.

    Args:
        output: the folder.
        option: the option that named it, for messages.

    Raises:
        UserError: another process has claimed it, or it cannot be made.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"{option}: {output} is a file; give a folder")
    missing = [folder for folder in (output, *output.parents) if not folder.exists()]
    with file_system_errors(output, option):
        output.mkdir(parents=True, exist_ok=True)
        handle = os.open(output, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{option}: another process is writing into {output}; wait for it") from None
        except OSError:
            pass  # a network file system without locks for folders
        yield
    finally:
        os.close(handle)
        for folder in missing:
            # Another process may have removed it.
            with contextlib.suppress(FileNotFoundError):
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()


@contextmanager
def staging(partial: Path, needed_bytes: int) -> Iterator[None]:
    """Make an empty folder to write in, inside a claimed one. It is removed if the block fails.

    Raises:
        UserError: too little space, or an error of the file system; names the folder or file.
    """
    try:
        with file_system_errors(partial.parent):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            check_space(partial.parent, needed_bytes)
            yield
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_space(folder: Path, needed_bytes: int) -> None:
    """Refuse to write more than fits on the disk.

    Raises:
        UserError: says how much is free and how much is needed.
    """
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        free, needed = (tqdm.format_sizeof(size, "B") for size in (free, needed_bytes))
        raise UserError(f"{OPTION}: the disk of {folder} has {free} free, {needed} are needed")


@contextmanager
def replacing(output: Path, former: Collection[str], partial: str, last: str) -> Iterator[Path]:
    """Yield a folder to write in. At the end of the block its contents replace a former output.

    Args:
        output: a claimed folder.
        former: names of what a former output consists of. These are removed.
        partial: the folder's name inside ``output`` meanwhile. It is removed if the block fails.
        last: the file that is removed first and written last. Where it exists, the output is whole.

    Raises:
        UserError: an error of the file system.
    """
    staged = output / partial
    with staging(staged, 0):
        yield staged
        with file_system_errors(output):
            for name in sorted(former, key=lambda name: name != last):
                (output / name).unlink(missing_ok=True)
            for path in sorted(staged.iterdir(), key=lambda path: (path.name == last, path.name)):
                path.replace(output / path.name)
            staged.rmdir()


def check_file(path: Path, *, overwrite: bool) -> None:
    """Refuse to overwrite a file unasked.

    Raises:
        UserError: it exists.
    """
    if path.exists() and not overwrite:
        raise UserError(f"{OPTION}: {path} exists; give another name or --overwrite")


def _some(names: list[str]) -> str:
    return f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}"
