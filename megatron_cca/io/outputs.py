"""Write output folders and files: replace nothing unasked, report a full disk in one line, show nothing half-done."""

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
from megatron_cca.io.paths import refusal, surroundings_fault


class LineFile:
    """A file of lines. Each line is appended in one write, and a missing file is made anew.

    Args:
        path: of the file. Its folder exists.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        # Unbuffered, so that no line waits in memory for a full disk.
        self._file = path.open("ab", buffering=0)

    def append(self, line: str) -> bool:
        """Append a line, and return whether the file was missing.

        Raises:
            OSError: an error of the file system. A later line may succeed.
        """
        is_gone = not self._is_there()
        if is_gone:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            anew = self._path.open("ab", buffering=0)
            self.close()
            self._file = anew
        self._file.write(f"{line}\n".encode())
        return is_gone

    def _is_there(self) -> bool:
        # Writing into a removed file raises no error.
        try:
            return os.path.samestat(self._path.stat(), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Close the file."""
        self._file.close()


OPTION = "--output"
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


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


def _some(names: list[str]) -> str:
    return f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}"


def check_writable(path: Path, option: str = OPTION) -> None:
    """Refuse, before any work, a file or folder that cannot be written. Nothing is made.

    Args:
        path: it need not exist.
        option: where the user named it, for messages.

    Raises:
        UserError: it cannot be written. The message gives the file system's reason.
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
    """Refuse an output that is the folder that is read, contains it, or lies in it."""
    inner, outer = output.resolve(), source.resolve()
    if inner == outer or inner.is_relative_to(outer) or outer.is_relative_to(inner):
        raise UserError(f"{OPTION}: {output} and {option} {source} are in each other's way; give another folder")


def remove_beside_others(folder: Path) -> None:
    """Remove a folder of which other processes may remove parts at the same time."""

    def not_missing(function, path, error: BaseException) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    shutil.rmtree(folder, onexc=not_missing)


@contextmanager
def claimed(output: Path) -> Iterator[None]:
    """Lock a folder against other processes inside the block. The folder is made if missing, and removed if left empty.

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


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a path beside ``path`` to write to.

    At the end of the block that file replaces ``path``, unless the block fails.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, contents: Any) -> None:
    """Write an object as JSON. The file is whole at any time, or what it was before."""
    write_text(path, json.dumps(contents, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text. The file is whole at any time, or what it was before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def file_system_errors(output: Path) -> Iterator[None]:
    """Turn an error of the file system while ``output`` is written into one line that names the folder or file."""
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
    """Return whether a file lies in an output, beside it, or on the way to it.

    Reading can raise the same errors elsewhere.
    """
    if not isinstance(name, str):
        return False
    file, whole = Path(name).absolute(), output.absolute()
    return file.is_relative_to(whole) or whole.parent.is_relative_to(file.parent)
