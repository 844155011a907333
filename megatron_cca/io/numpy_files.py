"""Read numpy's files without pickles, and without trusting what they say of their size."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_cca.errors import UserError


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
