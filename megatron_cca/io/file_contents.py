"""Tell what kind of file somebody gave, and read what other programs wrote into it.

That is JSON objects and numpy's archives. Of torch's old files only the claims are read, before torch reads the rest.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_cca.errors import UserError
from megatron_cca.io.external_files import reason_of
from megatron_cca.io.pickles import NotPlainError, PlainUnpickler

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
_MAX_LINE = 4096
_ITEM_BYTES = {"Double": 8, "Long": 8, "ComplexDouble": 16, "ComplexFloat": 8, "Float": 4, "Int": 4} | dict.fromkeys(
    ("Half", "BFloat16", "Short"), 2
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
        raise UserError(f"cannot be read as .npy ({reason_of(error)})") from None
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
        raise UserError(f"cannot be read as .npz ({reason_of(error)})") from None


def archived_names(path: Path) -> list[str]:
    """Return the names of the arrays in an ``.npz`` file that :func:`archived_arrays` has read."""
    with zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def refuse_swollen_storages(file: BinaryIO) -> None:
    """Refuse a file of torch before 1.6 whose tensors claim more bytes than it has.

    torch allocates these bytes before it reads any.
    """
    start, rest = file.tell(), _Rest(file)
    unpickler = None
    # The magic number, the version and the facts of the machine. Then the data, in which storages are named.
    for _ in range(4):
        unpickler = _StorageClaims(rest)
        unpickler.load()
    claimed = sum(unpickler.claims.values())
    file.seek(start)
    if claimed > rest.size:
        raise EOFError(f"its tensors claim {claimed} bytes, more than its own {rest.size}")


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


class _Rest:
    """The rest of a file. Reads never ask for more than it has."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, start = file, file.tell()
        self._end = file.seek(0, io.SEEK_END)
        self.size = self._end - start
        file.seek(start)

    def read(self, size: int) -> bytes:
        return self._file.read(min(size, self._end - self._file.tell()))

    def readline(self) -> bytes:
        return self._file.readline(_MAX_LINE)


class _Inert(dict):
    """A stand-in for whatever a pickle asks for. Nothing is called, and its arguments are dropped."""

    def __init__(self, *_: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass


class _StorageClaims(PlainUnpickler):
    """A reader of a pickle's storages. ``claims`` has their bytes by key."""

    def __init__(self, content: _Rest) -> None:
        super().__init__(content, lambda module, name: True)
        self.claims: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        return name.removesuffix("Storage") if name.endswith("Storage") else _Inert

    def persistent_load(self, pid: Any) -> None:
        kind, storage, key, _, count, _ = pid
        if kind not in ("storage", b"storage") or not isinstance(count, int) or not isinstance(storage, str):
            raise NotPlainError("it names something else than the storages of tensors")
        self.claims[str(key)] = max(0, count) * _ITEM_BYTES.get(storage, 1)
