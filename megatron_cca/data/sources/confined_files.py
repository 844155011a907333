"""Read files of a folder that the user named, and nothing outside it."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from megatron_cca.data.sources.foreign_text import printable
from megatron_cca.data.sources.source_protocol import Unreadable
from megatron_cca.errors import UserError
from megatron_cca.io.external_files import LFS_POINTER, hub_blobs, kind_of, kind_of_file

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
# More than any image has. A forged size must not fill the memory.
MAX_IMAGE_BYTES = 1 << 30
MAX_TEXT_BYTES = 1 << 24


@dataclass(frozen=True)
class Root:
    """A folder that the user named, and the places where its files may be.

    Attributes:
        path: of the folder, without symbolic links.
        others: further such paths, in which files may be read if a link or a list names them.
    """

    path: Path
    others: tuple[Path, ...] = ()

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str | os.PathLike) -> Path:
        return self.path / name

    def holds(self, reference: str | os.PathLike) -> bool:
        """Return whether a reference from inside the folder leads to a file in it, or in one of the other places.

        Raises:
            ValueError: a name that no file can have.
        """
        target = Path(os.path.realpath(self.path / reference))
        return any(target.is_relative_to(place) for place in (self.path, *self.others))


def real_folder(folder: Path, others: Iterable[Path] | None = None) -> Root:
    """Return the folder, free of symbolic links, that everything below it is compared with.

    Args:
        folder: named by the user. The contents of a snapshot in the hub's cache are in the cache's ``blobs``.
        others: folders outside it that the user also allows.
    """
    real = Path(os.path.realpath(folder))
    places = [Path(os.path.realpath(other)) for other in others or ()]
    blobs = hub_blobs(real)
    return Root(real, (*places, *([blobs] if blobs is not None else [])))


def outside_hint(targets: Sequence[str]) -> str:
    """Return the end of an error message: what a user can do about files outside the folder.

    Args:
        targets: absolute names of some of these files.
    """
    there = [os.path.realpath(target) for target in targets if os.path.exists(target)]  # noqa: PTH110 - foreign names
    if not there:
        return "no such files are there; write their names relative to the folder"
    place = os.path.commonpath([target if is_folder(Path(target)) else os.path.dirname(target) for target in there])  # noqa: PTH120
    return f"copy them there, or allow the place where they are: --allow-outside {printable(place)}"


def read_below(
    root: Root, reference: str, name: str, limit: int = MAX_IMAGE_BYTES, may_be_empty: bool = False
) -> bytes:
    """Return the contents of a file below a folder.

    Args:
        root: a result of :func:`real_folder`.
        reference: relative to it, foreign input.
        name: the record's, for the message.
        limit: in bytes.
        may_be_empty: whether an empty file is accepted.

    Raises:
        Unreadable: it leaves the folder, is missing, no file, empty, or larger than the limit.
    """
    with opened_below(root, reference, name) as file:
        size = os.fstat(file.fileno()).st_size
        if not size and not may_be_empty:
            raise OSError("is empty")
        if size > limit:
            raise OSError(f"has {size} bytes, at most {limit} are read")
        content = file.read(limit)
        if content.startswith(LFS_POINTER):
            raise OSError(f"is {kind_of(content)}")
        return content


@contextmanager
def opened_below(root: Root, reference: str, name: str) -> Iterator[BinaryIO]:
    """Open a file below a folder, see :func:`read_below`. Errors in the block are reported in the same way."""
    shown = printable(reference)
    try:
        if _ADDRESS.match(reference):
            raise Unreadable(name, f"{shown} is an address, and nothing is downloaded; download the images first")
        if not root.holds(reference):
            raise Unreadable(name, f"{shown} leaves the folder")
        # A named pipe must not block the job.
        descriptor = os.open(root / reference, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError("is not a file")
        with os.fdopen(descriptor, "rb") as file:
            yield file
    except FileNotFoundError:
        hint = '; folders are divided by "/"' if "\\" in reference else ""
        raise Unreadable(name, f"{shown} is missing{hint}") from None
    except OSError as error:
        raise Unreadable(name, f"{shown}: {error.strerror or error}") from None
    except ValueError:
        raise Unreadable(name, f"{shown} is not a file name") from None


def layout_file(root: Root, name: str, kinds: Collection[str] | None = ()) -> Path:
    """Return the path of a file of the layout itself (a list, an archive), free of symbolic links.

    Args:
        root: a result of :func:`real_folder`.
        name: relative to it.
        kinds: what :func:`~megatron_cca.io.external_files.kind_of` may return for it. None accepts all.

    Raises:
        UserError: it is missing, no file, cannot be read, leaves the folder or is of another kind.
    """
    path = root / name
    if not is_file(path):
        raise UserError(f"{printable(str(path))} is missing or not a file")
    if not root.holds(name):
        hint = outside_hint([str(path)])
        raise UserError(f"{printable(str(path))} leaves the folder by a symbolic link; {hint}")
    if not os.access(path, os.R_OK, effective_ids=True):
        raise UserError(f"{printable(str(path))} may not be read; change its permissions")
    if kinds is not None and (kind := kind_of_file(path)) not in (None, *kinds):
        raise UserError(f"{printable(str(path))} is {kind}, and is not read as anything else; give the file itself")
    return Path(os.path.realpath(path))


def is_file(path: Path) -> bool:
    """Return whether there is a file. In a folder that may not be searched there is none."""
    return os.path.isfile(path)  # noqa: PTH113 - Path.is_file raises where a folder may not be searched


def is_folder(path: Path) -> bool:
    """Return whether there is a folder, as :func:`is_file` does for files."""
    return os.path.isdir(path)  # noqa: PTH112


def names_in(folder: Path, *, hidden: bool = False) -> list[str]:
    """Return the names in a folder that are not hidden, or only the hidden ones, sorted.

    Raises:
        UserError: the folder may not be read.
    """
    try:
        return sorted(
            (entry.name for entry in folder.iterdir() if entry.name.startswith(".") == hidden), key=os.fsencode
        )
    except OSError as error:
        raise UserError(f"{printable(str(folder))}: {error.strerror}; give a folder that may be read") from None
