"""Read files of a folder that the user named, and nothing outside it, and list trees of images in it."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_cca.data.sources.external_text import PackedStrings, printable, unique_names
from megatron_cca.data.sources.source_protocol import Unreadable
from megatron_cca.errors import UserError
from megatron_cca.io.external_files import hub_blobs
from megatron_cca.io.file_contents import LFS_POINTER, kind_of, kind_of_file

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
# More than any image has. A forged size must not fill the memory.
MAX_IMAGE_BYTES = 1 << 30
MAX_TEXT_BYTES = 1 << 24
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
# Suffixes of the texts beside images, in the order of the search.
TEXT_SUFFIXES = (".txt", ".TXT", ".caption", ".CAPTION")
# Files of downloads and version control.
_NOT_WORTH_SAYING = frozenset({".cache", ".git", ".gitattributes", ".gitignore", ".DS_Store"})
# Of unread files, in one line.
_SHOWN_KINDS = 6
# The kind of folders that are not entered.
LINKED = "linked folders"
# How many links that lead outside are kept for the message about them.
_EXAMPLES = 20
_IMAGES_TO_RECOGNISE = 1000


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
    there = [os.path.realpath(target) for target in targets if os.path.exists(target)]  # noqa: PTH110 - untrusted names
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
        reference: relative to it, untrusted input.
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


def checked_file(root: Root, name: str, kinds: Collection[str] | None = ()) -> Path:
    """Check a file that a source layout itself needs (a list, an archive), and return its path without symbolic links.

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


def is_image(name: str) -> bool:
    """Return whether a file's name has the suffix of an image."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES  # noqa: PTH122 - called for every file


def text_beside(root: Root | Path, image: str) -> str | None:
    """Return the text of an image, relative to ``root``. None where there is none."""
    stem = os.path.splitext(image)[0]  # noqa: PTH122
    return next((stem + suffix for suffix in TEXT_SUFFIXES if os.path.lexists(root / (stem + suffix))), None)


def walk_files(root: Root | Path, unread: UnreadFiles | None = None, *, strict: bool = True) -> Iterator[str]:
    """Yield the files below a folder in any order, relative to it, with "/" between folders. Hidden ones are left out.

    Args:
        root: the folder.
        unread: counts hidden files.
        strict: whether to refuse a folder that may not be read, or a link that leads outside. Otherwise such a folder
            is counted as unread, and the link is yielded with a "/" at its end.

    Raises:
        UserError: a folder that may not be read, or a symbolic link to a folder outside of the allowed places.
            Following it might lead anywhere, and ignoring it would lose its images without notice.
    """
    return (name for name, _ in _walk(root if isinstance(root, Root) else real_folder(root), unread, strict))


def first_images(root: Root) -> list[str]:
    """Return some images below a folder, enough to recognise its layout. A tree may have millions."""
    images = (name for name in walk_files(root, strict=False) if is_image(name))
    return list(islice(images, _IMAGES_TO_RECOGNISE))


def name_hashes(names: Iterable[str]) -> np.ndarray:
    """Return a number for each name, int64 ``[N]``. Equal names have equal numbers within this process."""
    return np.array(array("q", map(hash, names)), dtype=np.int64)


def count_missing(names: np.ndarray, listed: np.ndarray) -> int:
    """Return how many names are not listed. Both are results of :func:`name_hashes`."""
    return int((~np.isin(names, listed)).sum())


class UnreadFiles:
    """A counter of files that a reader finds and does not read, by kind, with an example of each kind."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, str] = {}

    def add(self, name: str, kind: str | None = None) -> None:
        """Count a file or folder. A folder's name ends with "/". Without a given kind, its suffix is its kind."""
        base = name.rstrip("/").rpartition("/")[2]
        if base in _NOT_WORTH_SAYING:
            return
        if kind is None:
            suffix = "folders" if name.endswith("/") else os.path.splitext(base)[1].lower()  # noqa: PTH122
            kind = "hidden" if base.startswith(".") else suffix or "without a suffix"
        self._counts[kind] += 1
        self._examples[kind] = min(name, self._examples.get(kind, name))

    def line(self) -> str | None:
        """Return "not read: 3 .heic (a.heic), 1 .csv (labels.csv)". None where nothing was counted."""
        if not self._counts:
            return None
        kinds = sorted(self._counts.items(), key=lambda found: (-found[1], found[0]))
        parts = [
            f"{count} {printable(kind)} ({printable(self._examples[kind])})" for kind, count in kinds[:_SHOWN_KINDS]
        ]
        if len(kinds) > _SHOWN_KINDS:
            parts.append(f"{sum(count for _, count in kinds[_SHOWN_KINDS:])} of {len(kinds) - _SHOWN_KINDS} more kinds")
        return f"not read: {', '.join(parts)}"


class ImageTree:
    """The images below a folder, sorted by the bytes of their paths.

    Attributes:
        paths: relative to the folder.
        names: the same, printable and unique.
        texts: the texts there (:data:`TEXT_SUFFIXES`), also relative. Only where they are wanted.

    Args:
        root: the folder.
        wants_texts: whether texts are listed, too.
        others: files at the top that are read in another way.

    Raises:
        UserError: no images, only links that leave the folder, or what :func:`walk_files` refuses.
    """

    def __init__(self, root: Root, *, wants_texts: bool = False, others: Iterable[str] = ()) -> None:
        self._unread, self._outside, self._targets = UnreadFiles(), 0, []
        found, texts, known = [], [], frozenset(others)
        for name, is_link in _walk(root, self._unread):
            if is_image(name):
                found.append(name)
                self._count_link(root, name, is_link)
            elif wants_texts and name.endswith(TEXT_SUFFIXES):
                texts.append(name)
            elif name not in known:
                self._unread.add(name)
        if not found:
            found_instead = f"; {line}" if (line := self._unread.line()) else ""
            raise UserError(
                f"{printable(str(root))} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}){found_instead}"
            )
        if self._outside == len(found):
            raise UserError(f"{printable(str(root))}: {self._outside_line(len(found))}")
        found.sort(key=os.fsencode)
        self.paths = PackedStrings(found)
        self.names = PackedStrings(unique_names(found))
        self.texts = PackedStrings(sorted(texts, key=os.fsencode))

    def __len__(self) -> int:
        return len(self.paths)

    def digest(self) -> hashlib._Hash:
        """Return a sha256 of the paths, to be updated with more."""
        return hashlib.sha256(b"%d\0" % len(self) + self.paths.blob)

    def notices(self) -> list[str]:
        """See :class:`~megatron_cca.data.sources.source_protocol.Source`."""
        outside = [self._outside_line(len(self))] if self._outside else []
        line = self._unread.line()
        return outside + ([line] if line else [])

    def _count_link(self, root: Root, name: str, is_link: bool) -> None:
        if is_link and os.path.exists(root / name) and not root.holds(name):  # noqa: PTH110 - never raises
            self._outside += 1
            self._targets = sorted([*self._targets, str(root / name)])[:_EXAMPLES]

    def _outside_line(self, total: int) -> str:
        first = self._targets[0]
        shown = f"{printable(first.rpartition('/')[2])} to {printable(os.path.realpath(first))}"
        return (
            f"{self._outside} of {total} images are symbolic links that leave the folder, such as {shown}; "
            f"{outside_hint(self._targets)}"
        )


def _walk(root: Root, unread: UnreadFiles | None, strict: bool = True) -> Iterator[tuple[str, bool]]:
    """Yield each file, and whether it is a symbolic link."""
    waiting, followed = [""], set()
    while waiting:
        here = waiting.pop()
        for entry in _entries(root / here, None if strict else unread or UnreadFiles()):
            name = f"{here}{entry.name}"
            is_folder = _is_folder(entry)
            if entry.name.startswith("."):
                if unread is not None:
                    unread.add(f"{name}/" if is_folder else name)
            elif not is_folder:
                yield name, entry.is_symlink()
            elif not entry.is_symlink() or (reason := _why_not_entered(root, name, followed)) is None:
                waiting.append(f"{name}/")
            elif strict:
                raise UserError(reason)
            else:
                yield f"{name}/", True


def _entries(folder: Path, unread: UnreadFiles | None) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        if unread is not None:
            unread.add(f"{folder}/", "folders that may not be read")
            return []
        raise UserError(f"{printable(str(error.filename))}: {error.strerror}; give a folder that may be read") from None


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of links
        return False


def _why_not_entered(root: Root, name: str, followed: set[str]) -> str | None:
    """Return why a link to a folder is not followed. None where it leads to an allowed place, for the first time."""
    target = os.path.realpath(root / name)
    shown = f"{printable(str(root / name))} is a symbolic link to a folder"
    if target in followed:
        return f"{shown} that is linked twice; remove one of the links"
    if Path(target).is_relative_to(root.path) or not root.holds(name):
        return f"{shown}, which is not followed; {outside_hint([target])}"
    followed.add(target)
    return None
