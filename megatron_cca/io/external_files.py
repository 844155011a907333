"""Read files that somebody else may have written: JSON, numpy's arrays, and the names that a list gives to others."""

from __future__ import annotations

import io
import json
import math
import os
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_cca.errors import UserError, shortened
from megatron_cca.io.paths import LONGEST_NAME

BOM = b"\xef\xbb\xbf"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
ZIP, UTF_16 = "a zip archive", "text in UTF-16"
# How many bytes of a file :func:`kind_of` wants.
KIND_BYTES = 512
_KINDS = (
    (0, LFS_POINTER, "a Git LFS pointer in place of the file (git lfs pull brings the file)"),
    (0, b"\x1f\x8b", "compressed (gzip)"),
    (0, b"BZh", "compressed (bzip2)"),
    (0, b"\xfd7zXZ", "compressed (xz)"),
    (0, b"\x28\xb5\x2f\xfd", "compressed (zstd)"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (0, b"Rar!", "a RAR archive"),
    (0, b"PK\3\4", ZIP),
    (257, b"ustar", "a tar"),
    (0, b"PAR1", "a Parquet file"),
    (0, b"ARROW1", "an Arrow file"),
    (0, b"\x93NUMPY", "a numpy file"),
    (0, b"\x89HDF", "an HDF5 file"),
    (0, b"SQLite format 3\0", "an SQLite database"),
    (0, b"%PDF-", "a PDF"),
    (0, b"\x89PNG", "a PNG image"),
    (0, b"\xff\xd8\xff", "a JPEG image"),
    (0, b"GIF8", "a GIF image"),
    (8, b"WEBP", "a WebP image"),
    (0, b"II*\0", "a TIFF image"),
    (0, b"MM\0*", "a TIFF image"),
    (4, b"ftyp", "a HEIC or AVIF image, or a video"),
    (0, b"\xff\xfe\0\0", "text in UTF-32"),
    (0, b"\xff\xfe", UTF_16),
    (0, b"\xfe\xff", UTF_16),
)
_PAGES = (b"<!doctype html", b"<html")


def kind_of(start: bytes) -> str | None:
    """Return the kind of a file in words, by its first :data:`KIND_BYTES` bytes.

    None means unknown, as of plain text.
    """
    for offset, magic, name in _KINDS:
        if start[offset : offset + len(magic)] == magic:
            return name
    if start[:20].lstrip().lower().startswith(_PAGES):
        return "a web page"
    # An ASCII letter in UTF-16 has a zero byte before or after it.
    return UTF_16 if len(start) > 1 and (start[0] == 0) != (start[1] == 0) else None


def kind_of_file(path: Path) -> str | None:
    """Return the :func:`kind_of` a file. None means unknown, or that the file cannot be read."""
    try:
        with path.open("rb") as file:
            return kind_of(file.read(KIND_BYTES))
    except (OSError, ValueError):
        return None


def kind_hint(path: Path, but: Collection[str] = ()) -> str:
    """Return the end of an error message that says what kind of file this is.

    It is empty where that is unknown or expected.

    Args:
        path: the file.
        but: the kinds that the reader expects.
    """
    kind = kind_of_file(path)
    return "" if kind is None or kind in but else f"; it is {kind}"


def hub_blobs(folder: str | os.PathLike) -> Path | None:
    """Return where the hub's cache keeps the contents of a snapshot. The files of a snapshot are links to there.

    Args:
        folder: ``.../snapshots/REVISION``, or a folder in it, without symbolic links.

    Returns:
        ``blobs`` beside ``snapshots``. None for any other folder.
    """
    for revision in (Path(folder), *Path(folder).parents):
        blobs = revision.parent.parent / "blobs"
        if revision.parent.name == "snapshots" and os.path.isdir(blobs):  # noqa: PTH112 - never raises
            return Path(os.path.realpath(blobs))
    return None


def is_file_name(name: object) -> bool:
    """Return whether something found in a file may be the name of another file in the same folder."""
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\0" in name:
        return False
    try:
        return len(os.fsencode(name)) <= LONGEST_NAME
    except UnicodeEncodeError:
        return False


def file_below(folder: Path, name: object) -> Path:
    """Return the path of a file whose name was found inside a folder.

    Args:
        folder: named by the user. It may be a symbolic link itself.
        name: foreign input, relative to the folder.

    Raises:
        UserError: no text, an absolute name, one that leaves the folder by ".." or by a symbolic link, or no such file.
    """
    if not isinstance(name, str) or not is_below(folder, name):
        reason = "; names are relative to it" if isinstance(name, str) and Path(name).is_absolute() else ""
        raise UserError(f"{shortened(repr(name), 80)} is not a file of {folder}{reason}")
    path = folder / name
    if not os.path.isfile(path):  # noqa: PTH113 - Path.is_file raises for names that no file can have
        raise UserError(f"{shortened(name, 80)} is missing in {folder}")
    return path


def is_below(folder: Path, name: str) -> bool:
    """Return whether a name stays in a folder: relative, without a ".." or a symbolic link that leads out of it.

    In a snapshot of the hub's cache, a link may also lead into the cache's contents.
    """
    try:
        target, real = os.path.realpath(folder / name), os.path.realpath(folder)
    except (OSError, ValueError):
        return False
    places = [f"{place}/".replace("//", "/") for place in (real, hub_blobs(real)) if place is not None]
    return not Path(name).is_absolute() and target.startswith(tuple(places))


def json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        UserError: the file cannot be read, or holds no object; names the file.
    """
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object{kind_hint(path)}")
    return found


def json_lines(path: Path, **required: type) -> Iterator[tuple[str, dict]]:
    """Yield the complete lines of a log and the objects in them. A killed run may leave half of its last line.

    Args:
        path: the file. If it is missing, there are no lines.
        required: keys that every object has, with their types.

    Raises:
        UserError: a line that holds something else; names it.
    """
    lines = path.read_text(errors="replace").split("\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or any(type(row.get(key)) is not kind for key, kind in required.items()):
            raise UserError(f"{path}: line {number} is damaged; remove it, or move the file away")
        yield f"{line}\n", row


def mapped_array(path: Path) -> np.ndarray:
    """Return the array in an ``.npy`` file, as a read-only memory map.

    Raises:
        UserError: a damaged file, or one that holds something else. The message does not name it.
    """
    try:
        # numpy refuses to map an array that is longer than the file.
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    # numpy promises no closed set for damaged headers.
    except Exception as error:
        raise UserError(f"cannot be read as .npy ({_reason(error)})") from None
    if not isinstance(found, np.ndarray):
        raise UserError("holds something else than one array")
    return found


def array_in(content: bytes) -> np.ndarray:
    """Return the array in the bytes of an ``.npy`` file.

    Raises:
        UserError: damaged, cut short, or something else than one array of plain data.
    """
    file = io.BytesIO(content)
    try:
        shape, is_fortran, dtype = _header(file)
    # numpy promises no closed set for damaged headers.
    except Exception as error:
        raise UserError(f"cannot be read as .npy ({_reason(error)})") from None
    size = math.prod(shape) * dtype.itemsize
    if dtype.hasobject or min(shape, default=1) < 0 or size != len(content) - file.tell():
        raise UserError("cannot be read as .npy (it holds objects, or is not as long as it says)")
    found = np.frombuffer(content, dtype, offset=file.tell())
    return found.reshape(shape, order="F" if is_fortran else "C")


def archived_arrays(path: Path, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """Return the arrays in an ``.npz`` file.

    Args:
        path: the file.
        names: the arrays to read, as far as they exist. None means all.

    Raises:
        UserError: a damaged file, one that holds objects, or an array that claims more bytes than the file has. The
            message does not name the file.
    """
    if not zipfile.is_zipfile(path):
        raise UserError("cannot be read as .npz: it is cut short or something else; write it with numpy.savez")
    try:
        with zipfile.ZipFile(path) as archive:
            members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
            wanted = [name for name in members if names is None or name in names]
            return {name: _array_in(archive, members[name]) for name in wanted}
    except UserError:
        raise
    # zipfile promises no closed set of exceptions either.
    except Exception as error:
        raise UserError(f"cannot be read as .npz ({_reason(error)})") from None


def archived_names(path: Path) -> list[str]:
    """Return the names of the arrays in an ``.npz`` file that :func:`archived_arrays` has read."""
    with zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def _array_in(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(member) as file:
        shape, _, dtype = _header(file)
    # numpy allocates before it reads. So many compressed bytes cannot unpack to more than this.
    if math.prod(shape) * dtype.itemsize > min(member.file_size, 2000 * member.compress_size):
        raise UserError(f"{member.filename} is larger than what is there of it")
    with archive.open(member) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def _reason(error: Any) -> str:
    return " ".join(str(error).split()) or type(error).__name__
