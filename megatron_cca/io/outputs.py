"""Write files: say before any work what cannot be written, report a full disk in one line, show nothing half-done."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_cca.errors import UserError
from megatron_cca.io.paths import refusal, surroundings_fault

OPTION = "--output"
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


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
def file_system_errors(output: Path, option: str = OPTION) -> Iterator[None]:
    """Turn an error of the file system while ``output`` is written into one line that names the folder or file."""
    try:
        yield
    except OSError as error:
        fault = surroundings_fault(error)
        if fault is not None:
            raise fault from None
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _cannot_be_written(output, error, option) from None
        if error.errno in _NOT_ALLOWED and _leads_to(error.filename, output):
            raise _cannot_be_written(Path(error.filename), error, option) from None
        raise UserError(f"{error.filename or output}: {error.strerror or error}") from None


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


def _cannot_be_written(path: Path, error: OSError, option: str = OPTION) -> UserError:
    if error.errno == errno.ENOTDIR:
        found = next((str(one) for one in path.parents if one.is_file()), "a part of it")
        return UserError(f"{option}: {path} cannot be written: {found} is a file; give another folder")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"{option}: the disk of {path} is full ({error.strerror}); free some space or give another")
    return UserError(f"{option}: {path} cannot be written ({error.strerror}); give a folder that can be")


def _leads_to(name: object, output: Path) -> bool:
    """Return whether a file lies in an output, beside it, or on the way to it.

    Reading can raise the same errors elsewhere.
    """
    if not isinstance(name, str):
        return False
    file, whole = Path(name).absolute(), output.absolute()
    return file.is_relative_to(whole) or whole.parent.is_relative_to(file.parent)
