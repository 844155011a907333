"""Read Emu3's own lists of tokenised images: {"prefix": folder, "path_list": [names]}, and one ``.pth`` per image.

``torch.load`` with ``weights_only`` calls nothing that is not on its list. numpy is not on it, and numpy's own function
that restores arrays trusts its input: a forged data type makes it follow pointers. Stand-ins therefore take its place.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_cca.data.sources.external_text import PackedStrings, clean_text, printable, unique_names
from megatron_cca.data.sources.folders import (
    Root,
    checked_file,
    count_missing,
    is_file,
    is_folder,
    name_hashes,
    names_in,
    opened_below,
    read_below,
    real_folder,
    walk_files,
)
from megatron_cca.data.sources.source_protocol import Record, Source, SourceOptions, Unreadable, checked_index
from megatron_cca.errors import UserError
from megatron_cca.io.file_contents import kind_of_file
from megatron_cca.io.pickles import NotPlainError, load_tensors

# numpy's codes of integer types, and the names of its function that restores arrays.
_INTEGERS = frozenset(f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8))
_RECONSTRUCT = ("numpy._core.multiarray._reconstruct", "numpy.core.multiarray._reconstruct")
# The folder where Emu3's programs write the files.
FEATURES = "feature"
# More than any image has: 4,096 x 4,096 codes. A forged tensor of a few bytes may claim any size.
_MAX_CODES = 1 << 24
_MAX_PTH_BYTES = 1 << 28
# Of a file, to recognise a list.
_START_BYTES = 1 << 12


def recognises(path: Path, options: SourceOptions) -> bool:
    """Return whether a path is a list, or a folder with one in it or in its ``list``."""
    return bool(_lists(path))


def open_emu3(path: Path, options: SourceOptions) -> Source:
    """Open the source of a list, or of the only list in a folder.

    Raises:
        UserError: no list or several, a damaged or empty one, or a ``prefix`` that leads nowhere.
    """
    path = path if is_file(path) else _only_list(path, options)
    prefix, names = _read_list(path)
    return TokenizedFiles(real_folder(_found_folder(path, prefix), options.allow_outside), names)


class TokenizedFiles:
    """One ``.pth`` per record: {"name": ..., "images": int [H, W] array or tensor, "texts": caption}."""

    def __init__(self, root: Root, names: list[str]) -> None:
        self._root = root
        self._paths = PackedStrings(names)
        self._names = PackedStrings(unique_names(names))

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Record:
        index = checked_index(index, len(self))
        name = self._names[index]
        content = read_below(self._root, self._paths[index], name, _MAX_PTH_BYTES)
        try:
            found = load_plain(content)
        # The file is untrusted, and torch's reader can raise anything.
        except Exception as error:
            raise Unreadable(name, f"not a .pth of plain data: {_reason(error)}") from None
        if not isinstance(found, dict) or "images" not in found:
            raise Unreadable(name, 'not one of Emu3\'s files: it has no "images"')
        return Record(name, clean_text(found.get("texts"), "texts", name), None, (), _codes(found["images"], name))

    def notices(self) -> list[str]:
        """See :class:`Source`. Lists the folder."""
        lines = []
        listed = name_hashes(os.path.normpath(self._paths[index]) for index in range(len(self)))
        if repeats := len(listed) - len(np.unique(listed)):
            lines.append(f"the list names {repeats} files again that it has named before; each is a sample")
        there = name_hashes(name for name in walk_files(self._root, strict=False) if name.endswith(".pth"))
        if unlisted := count_missing(there, listed):
            lines.append(f"{unlisted} of {len(there)} .pth files that lie there are not in the list and are not read")
        return lines

    def fingerprint(self) -> str:
        """See :class:`Source`. Reads the checksums in each file, not its codes."""
        digest = hashlib.sha256(self._paths.blob)
        for index in range(len(self)):
            try:
                with opened_below(self._root, self._paths[index], "") as file:
                    digest.update(_check_sums(file))
            except Unreadable as error:
                digest.update(str(error).encode())
        return digest.hexdigest()[:16]


def load_plain(content: bytes) -> Any:
    """Return what a ``.pth`` file holds. numpy arrays in a dictionary's values become integer arrays.

    Raises:
        Exception: of nearly any class. The file is damaged, or asks for something that is not plain data. Nothing was
            run.
    """
    allowed = [(_reconstruct, name) for name in _RECONSTRUCT]
    allowed += [(_Array, "numpy.ndarray"), (_Type, "numpy.dtype")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = load_tensors(content, allowed)
    if isinstance(found, dict):
        return {key: value.values if type(value) is _Array else value for key, value in found.items()}
    return found


def _lists(path: Path) -> list[Path]:
    if is_file(path):
        return [path] if _looks_like_a_list(path) else []
    for folder in (path, path / "list"):
        names = names_in(folder) if is_folder(folder) else []
        if found := [folder / name for name in names if _looks_like_a_list(folder / name)]:
            return found
    return []


def _looks_like_a_list(path: Path) -> bool:
    """Return whether a file is a list, by its name and first bytes, since it may be large."""
    if path.suffix != ".json" or not is_file(path):
        return False
    try:
        with path.open("rb") as file:
            start = file.read(_START_BYTES)
    except OSError:
        return False
    return b'"prefix"' in start or b'"path_list"' in start


def _only_list(folder: Path, options: SourceOptions) -> Path:
    lists = _lists(folder)
    if len(lists) != 1:
        found = f"several lists ({', '.join(printable(path.name) for path in lists)})" if lists else "no list"
        raise UserError(f'{folder} holds {found}; give one JSON file with "prefix" and "path_list"')
    return checked_file(real_folder(folder, options.allow_outside), str(lists[0].relative_to(folder)))


def _read_list(path: Path) -> tuple[str, list[str]]:
    try:
        found = json.loads(path.read_bytes())
        prefix, names = found["prefix"], found["path_list"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        kind = kind_of_file(path)
        found = f"it is {kind}, and " if kind else ""
        raise UserError(f'{path} is not a list of Emu3\'s; {found}it needs "prefix" and "path_list"') from None
    if not isinstance(prefix, str) or not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f'{path}: "prefix" must be a folder and "path_list" a list of file names')
    if not names:
        raise UserError(f'{path}: "path_list" is empty; tokenize some images')
    return prefix, names


def _found_folder(path: Path, prefix: str) -> Path:
    """Return the folder of the files. People move data, and the list still has the old path."""
    path = path.absolute()
    for folder in (path.parent / prefix, path.parent.parent / FEATURES):
        if is_folder(folder):
            return folder
    raise UserError(f'{path}: neither its "prefix" {printable(prefix)} nor {path.parent.parent / FEATURES} is a folder')


def _check_sums(file: BinaryIO) -> bytes:
    try:
        with zipfile.ZipFile(file) as archive:
            return repr([(member.filename, member.CRC) for member in archive.infolist()]).encode()
    # torch's old format, or damage of any kind.
    except Exception:
        file.seek(0)
        return hashlib.sha256(file.read(_MAX_PTH_BYTES)).digest()


def _reason(error: Exception) -> str:
    """Return what is wrong, unless it is only damage."""
    return printable(str(error)) if isinstance(error, NotPlainError) else "it is damaged or of another format"


def _codes(images: Any, name: str) -> np.ndarray:
    """Return the codes as int64 ``[1, H, W]``."""
    array = images if isinstance(images, np.ndarray) else _array_of(images, name)
    if array.ndim == 2:
        array = array[None]
    if array.ndim != 3 or array.shape[0] != 1 or not 0 < array.size <= _MAX_CODES:
        raise Unreadable(name, f'"images" has shape {list(array.shape)}, [height, width] is needed')
    if array.min() < 0 or array.max() > np.iinfo(np.int64).max:
        raise Unreadable(name, '"images" has codes that are negative or too large')
    return np.ascontiguousarray(array, dtype=np.int64)


def _array_of(tensor: Any, name: str) -> np.ndarray:
    """Return an integer tensor as an array."""
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise Unreadable(name, '"images" must be an array of integers')
    kinds = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    is_plain = tensor.layout is torch.strided and tensor.device.type == "cpu" and tensor.dtype in kinds
    if not is_plain or tensor.numel() > _MAX_CODES:
        raise Unreadable(
            name, f'"images" is a {tensor.dtype} tensor of shape {list(tensor.shape)}, not [height, width]'
        )
    return tensor.detach().numpy()


class _Type:
    """A stand-in for ``numpy.dtype``, for integers only."""

    def __init__(self, code: str, *_: Any) -> None:
        if code not in _INTEGERS:
            raise NotPlainError(f"an array of type {code!r:.20} instead of integers")
        self.code = code
        self.order = "<"

    def __setstate__(self, state: tuple) -> None:
        order = state[1]
        if order not in ("<", ">", "|"):
            raise NotPlainError("an array of unknown byte order")
        self.order = order


class _Array:
    """A stand-in for ``numpy.ndarray``. :attr:`values` is the array once its state is known."""

    values: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, kind, is_fortran, content = state
        if type(kind) is not _Type or type(content) is not bytes or not all(type(size) is int for size in shape):
            raise NotPlainError("an array of another kind than numpy writes")
        flat = np.frombuffer(content, dtype=kind.order + kind.code)
        if min(shape, default=0) < 0 or math.prod(shape) != len(flat):
            raise NotPlainError("an array whose size is not that of its contents")
        self.values = flat.reshape(shape, order="F" if is_fortran else "C")


def _reconstruct(*_: Any) -> _Array:
    return _Array()
