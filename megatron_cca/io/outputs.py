"""Output folders: nothing is replaced unasked, a full disk is one line, and what is half-written never looks whole."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_cca.errors import UserError
from megatron_cca.io.surroundings import refusal, surroundings_fault

OPTION = "--output"
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


def check_output(output: Path, former: Collection[str], unfinished: Collection[str], *, overwrite: bool) -> None:
    """Refuse a claimed folder that holds something which is not to be replaced.

    Args:
        output: the folder that the user named.
        former: what a former output of the same kind consists of; only that may be replaced.
        unfinished: names under which an interrupted attempt may have left something; they do not count.
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


def _some(names: list[str]) -> str:
    return f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}"


def check_writable(path: Path, option: str = OPTION) -> None:
    """Refuse, before any work, a file or folder that could not be written after it; nothing is made.

    Args:
        path: it need not exist.
        option: where the user named it, for messages.

    Raises:
        UserError: says what the file system has against it.
    """
    is_folder = os.path.isdir(path)  # noqa: PTH112 - Path.is_dir raises below a folder that may not be entered
    error = refusal(path if is_folder else path.parent, make=False)
    if error is not None:
        raise _cannot_be_written(path, error, option)


def _cannot_be_written(path: Path, error: OSError, option: str = OPTION) -> UserError:
    if error.errno == errno.ENOTDIR:
        found = next((str(one) for one in path.parents if one.is_file()), "a part of it")
        return UserError(f"{option}: {path} cannot be written: {found} is a file; give another folder")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"{option}: the disk of {path} is full ({error.strerror}); free some space or give another")
    return UserError(f"{option}: {path} cannot be written ({error.strerror}); give a folder that can be")


def check_apart(output: Path, source: Path, option: str) -> None:
    """Refuse to write into the folder that is read, around it or inside it."""
    inner, outer = output.resolve(), source.resolve()
    if inner == outer or inner.is_relative_to(outer) or outer.is_relative_to(inner):
        raise UserError(f"{OPTION}: {output} and {option} {source} are in each other's way; give another folder")


@contextmanager
def claimed(output: Path) -> Iterator[None]:
    """Keep other processes from writing into the folder meanwhile; it is made if there is none, and goes if left empty.

    Raises:
        UserError: another process has claimed it, or it cannot be made.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"{OPTION}: {output} is a file; give a folder")
    missing = [folder for folder in (output, *output.parents) if not folder.exists()]
    with file_system_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        handle = os.open(output, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{OPTION}: another process is writing into {output}; wait for it") from None
        except OSError:
            pass  # a network file system without locks for folders
        yield
    finally:
        os.close(handle)
        for folder in missing:
            # Whoever tidies up around it may have been quicker.
            with contextlib.suppress(FileNotFoundError):
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()


@contextmanager
def staging(partial: Path, needed_bytes: int) -> Iterator[None]:
    """Make an empty folder to write in, inside a claimed one; it disappears again if the block fails.

    Raises:
        UserError: too little space, or anything the file system refuses; names the folder or file.
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
    """Refuse to write more than fits.

    Raises:
        UserError: says how much is free and how much is needed.
    """
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        free, needed = (tqdm.format_sizeof(size, "B") for size in (free, needed_bytes))
        raise UserError(f"{OPTION}: the disk of {folder} has {free} free, {needed} are needed")


@contextmanager
def replacing(output: Path, former: Collection[str], partial: str, last: str) -> Iterator[Path]:
    """A folder to write in; what is there at the end takes the place of a former output.

    Args:
        output: a claimed folder.
        former: names of what a former output consists of; it goes.
        partial: the folder's name inside ``output`` meanwhile; it disappears if the block fails.
        last: the file that goes first and arrives last: where it is, all is there.

    Raises:
        UserError: the file system refuses.
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
    """Refuse to write over a file unasked.

    Raises:
        UserError: it exists.
    """
    if path.exists() and not overwrite:
        raise UserError(f"{OPTION}: {path} exists; give another name or --overwrite")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write, beside ``path``, whose place it takes at the end; it disappears if the block fails."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, contents: Any) -> None:
    """Under its name the file is whole or what it was before."""
    write_text(path, json.dumps(contents, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Under its name the file is whole or what it was before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def file_system_errors(output: Path) -> Iterator[None]:
    """Turn what the file system refuses while ``output`` is written into one line; names the folder or file."""
    try:
        yield
    except OSError as error:
        fault = surroundings_fault(error)
        if fault is not None:
            raise fault from None
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _cannot_be_written(output, error) from None
        if error.errno in _NOT_ALLOWED and _leads_to(error.filename, output):
            raise _cannot_be_written(Path(error.filename), error) from None
        raise UserError(f"{error.filename or output}: {error.strerror or error}") from None


def _leads_to(name: object, output: Path) -> bool:
    """Whether a file lies in an output, beside it, or on the way to it: what is read may have the same errors."""
    if not isinstance(name, str):
        return False
    file, whole = Path(name).absolute(), output.absolute()
    return file.is_relative_to(whole) or whole.parent.is_relative_to(file.parent)
