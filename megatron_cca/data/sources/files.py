"""Reads files of a folder that the user named, and nothing outside it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from megatron_cca.data.sources.records import Unreadable
from megatron_cca.data.sources.texts import printable
from megatron_cca.errors import UserError

# Far beyond any image; keeps a forged size from filling the memory.
MAX_IMAGE_BYTES = 1 << 30
MAX_TEXT_BYTES = 1 << 24


def real_folder(folder: Path) -> Path:
    """The folder that the user named, without symbolic links: what everything below is measured against."""
    return Path(os.path.realpath(folder))


def leaves(root: Path, reference: str) -> bool:
    """Whether a reference from inside ``root`` (a result of :func:`real_folder`) ends outside it.

    Raises:
        ValueError: a name that no file can have.
    """
    return Path(reference).is_absolute() or not Path(os.path.realpath(root / reference)).is_relative_to(root)


def read_below(
    root: Path, reference: str, name: str, limit: int = MAX_IMAGE_BYTES, may_be_empty: bool = False
) -> bytes:
    """The contents of a file below a folder.

    Args:
        root: a result of :func:`real_folder`.
        reference: relative to it; foreign input.
        name: the record's, for the message.
        limit: in bytes.
        may_be_empty: whether a file of no bytes is taken.

    Raises:
        Unreadable: it leaves the folder, is missing, no file, empty, or larger than the limit.
    """
    with opened_below(root, reference, name) as file:
        size = os.fstat(file.fileno()).st_size
        if not size and not may_be_empty:
            raise OSError("is empty")
        if size > limit:
            raise OSError(f"has {size} bytes, at most {limit} are read")
        return file.read(limit)


@contextmanager
def opened_below(root: Path, reference: str, name: str) -> Iterator[BinaryIO]:
    """A file below a folder; see :func:`read_below`. What goes wrong in the block with the file is told alike."""
    shown = printable(reference)
    try:
        if leaves(root, reference):
            raise Unreadable(name, f"{shown} leaves the folder")
        # A named pipe must not block the job.
        descriptor = os.open(root / reference, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError("is not a file")
        with os.fdopen(descriptor, "rb") as file:
            yield file
    except FileNotFoundError:
        raise Unreadable(name, f"{shown} is missing") from None
    except OSError as error:
        raise Unreadable(name, f"{shown}: {error.strerror or error}") from None
    except ValueError:
        raise Unreadable(name, f"{shown} is not a file name") from None


def own_file(root: Path, name: str) -> Path:
    """The path of a file of the layout itself (a list, an archive), free of symbolic links.

    Raises:
        UserError: it is missing, no file, cannot be read or leaves the folder.
    """
    path = root / name
    if not is_file(path):
        raise UserError(f"{printable(str(path))} is missing or not a file")
    if leaves(root, name):
        raise UserError(f"{printable(str(path))} leaves the folder by a symbolic link; copy the file there")
    if not os.access(path, os.R_OK, effective_ids=True):
        raise UserError(f"{printable(str(path))} may not be read; change its permissions")
    return Path(os.path.realpath(path))


def is_file(path: Path) -> bool:
    """Whether there is a file; a folder that may not be searched has none."""
    return os.path.isfile(path)  # noqa: PTH113 - Path.is_file raises where a folder may not be searched


def is_folder(path: Path) -> bool:
    """Whether there is a folder; see :func:`is_file`."""
    return os.path.isdir(path)  # noqa: PTH112


def names_in(folder: Path) -> list[str]:
    """The names in a folder without hidden ones, sorted.

    Raises:
        UserError: it may not be read.
    """
    try:
        return sorted((entry.name for entry in folder.iterdir() if not entry.name.startswith(".")), key=os.fsencode)
    except OSError as error:
        raise UserError(f"{printable(str(folder))}: {error.strerror}; give a folder that may be read") from None
