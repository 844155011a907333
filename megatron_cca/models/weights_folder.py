"""Folders of weights as ``from_pretrained`` takes them: one file or several, safetensors or pickles.

All are read as memory maps, and none is run.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_cca.errors import UserError, error_context, first_line, shortened
from megatron_cca.io.external_files import is_file_name
from megatron_cca.io.file_contents import UTF_16, kind_hint
from megatron_cca.models.weight_files import INDEX, SINGLE, num_bytes, row_ranges, tensors_in, unwrapped

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# The format lets an empty tensor claim any shape.
_MAX_SIZE = 2**40
# A map keeps all pages that were read in the resident set. After so many bytes a file is mapped anew.
MAPPED_BYTES = 2**28
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """File, name in the file, shape and dtype of a tensor."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size of the tensor in bytes."""
        return num_bytes(self.shape, self.dtype)


class WeightsFolder(ABC):
    """The tensors of one file, or of the files that an index names.

    Attributes:
        single, index: the names of the file and of the index.
        tensors: the tensors, by name without the parts that wrappers add.

    Args:
        folder: the folder.
        option: the command-line option that named the folder, for messages. None where the caller names it.

    Raises:
        UserError: a file is missing, truncated or unreadable, or a tensor is not where the index says. Names it.
    """

    single: ClassVar[str]
    index: ClassVar[str]

    def __init__(self, folder: Path, option: str | None) -> None:
        self._named = "" if option is None else f"{option}: "
        # A folder may have both. This is transformers' order.
        has_index = (folder / self.index).is_file() and not (folder / self.single).is_file()
        found = self._scan_index(folder) if has_index else self._scan_single(folder)
        with error_context(f"{self._named}{folder}"):
            self.tensors = {name: found[stored] for name, stored in unwrapped(found).items()}

    @classmethod
    def is_in(cls, folder: Path) -> bool:
        """Return whether a folder has such files, by name."""
        return (folder / cls.single).is_file() or (folder / cls.index).is_file()

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows ``start .. stop`` as a view of a memory map, or the whole tensor if it is a scalar."""
        return self.read_info(self.tensors[name], start, stop)

    @abstractmethod
    def read_info(self, info: TensorInfo, start: int = 0, stop: int | None = None) -> Tensor:
        """Do the same as :meth:`read`, but for a :class:`TensorInfo` instead of a name."""

    def pieces(self, name: str) -> Iterator[Tensor]:
        """Return an iterator over a whole tensor, piece by piece."""
        info = self.tensors[name]
        return (self.read(name, start, stop) for start, stop in row_ranges(info.shape, info.dtype))

    def equal(self, one: TensorInfo, other: TensorInfo) -> bool:
        """Return whether two tensors have the same dtype, shape and numbers."""
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            return False
        ranges = row_ranges(one.shape, one.dtype)
        return all(torch.equal(self.read_info(one, *rows), self.read_info(other, *rows)) for rows in ranges)

    @abstractmethod
    def _scan_file(self, path: Path) -> dict[str, TensorInfo]:
        """Return the tensors of a file, by their names in it."""

    def _scan_single(self, folder: Path) -> dict[str, TensorInfo]:
        if not (folder / self.single).is_file():
            raise UserError(f"{self._named}{folder} has neither {self.single} nor {self.index}{_what_else(folder)}")
        return self._scan_file(folder / self.single)

    def _scan_index(self, folder: Path) -> dict[str, TensorInfo]:
        path = folder / self.index
        try:
            wanted = json.loads(path.read_text())["weight_map"]
            files = sorted(set(wanted.values()))
            if not all(isinstance(file, str) for file in files):
                raise TypeError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{self._named}{path} is damaged: expected JSON with a weight_map") from None
        for file in files:
            if not is_file_name(file):
                raise UserError(
                    f"{self._named}{path} names {shortened(repr(file), 80)}, which is not a file of the same folder"
                )
            if not (folder / file).is_file():
                raise UserError(f"{self._named}{folder / file} is missing, but {self.index} names it")
        found = {}
        for file in files:
            for name, info in self._scan_file(folder / file).items():
                if name in found:
                    raise UserError(f"{self._named}tensor {name} is in {found[name].file.name} and in {file}")
                found[name] = info
        for name, file in wanted.items():
            if name not in found or found[name].file.name != file:
                raise UserError(f"{self._named}tensor {name} is not in {folder / file}, where {self.index} says it is")
        return found


class SafetensorsFolder(WeightsFolder):
    """See :class:`WeightsFolder`."""

    single, index = SINGLE, INDEX

    def read_info(self, info: TensorInfo, start: int = 0, stop: int | None = None) -> Tensor:
        """See the base class."""
        # Open the file each time. A map that stays open keeps all pages that were read in the resident set.
        with safe_open(info.file, framework="pt") as file:
            return file.get_slice(info.name)[start:stop] if info.shape else file.get_tensor(info.name)

    def _scan_file(self, path: Path) -> dict[str, TensorInfo]:
        found = {}
        with path.open("rb"):
            pass  # raises for lack of permission, which safetensors reports as a missing file
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dictionary
                    part = file.get_slice(name)
                    dtype = part.get_dtype()
                    if dtype not in _DTYPES:
                        raise UserError(f"{self._named}tensor {name} in {path} has dtype {dtype}, which is not known")
                    shape = tuple(part.get_shape())
                    if max(shape, default=0) > _MAX_SIZE:
                        raise UserError(f"{self._named}tensor {name} in {path} claims the shape {list(shape)}")
                    found[name] = TensorInfo(path, name, shape, _DTYPES[dtype])
        except (SafetensorError, OSError) as error:
            # A header's length looks like UTF-16.
            why = kind_hint(path, but=[UTF_16]) or f": {first_line(error)}"
            raise UserError(f"{self._named}{path} is truncated or not a safetensors file{why}") from None
        return found


class PickledFolder(WeightsFolder):
    """See :class:`WeightsFolder`. Files that torch before 1.6 wrote are in memory while they are read."""

    single, index = "pytorch_model.bin", "pytorch_model.bin.index.json"

    def __init__(self, folder: Path, option: str | None) -> None:
        self._open: tuple[Path, dict[str, Tensor]] | None = None
        self._read_bytes = 0
        super().__init__(folder, option)

    def read_info(self, info: TensorInfo, start: int = 0, stop: int | None = None) -> Tensor:
        """See the base class."""
        if self._read_bytes > MAPPED_BYTES and is_zipfile(info.file):
            self._open = None
        tensor = self._tensors(info.file)[info.name].detach()
        rows = tensor[start:stop] if info.shape else tensor
        self._read_bytes += rows.nbytes
        return rows

    def _scan_file(self, path: Path) -> dict[str, TensorInfo]:
        found = {}
        for name, tensor in self._tensors(path).items():
            if tensor.dtype not in DTYPE_NAMES:
                raise UserError(f"{self._named}tensor {name} in {path} has dtype {tensor.dtype}, which is not known")
            found[name] = TensorInfo(path, name, tuple(tensor.shape), tensor.dtype)
        return found

    def _tensors(self, path: Path) -> dict[str, Tensor]:
        if self._open is None or self._open[0] != path:
            # One file at a time.
            self._open, self._read_bytes = None, 0
            with error_context(f"{self._named}{path}"):
                self._open = path, tensors_in(path, ())
        return self._open[1]


def open_weights(folder: Path, option: str | None) -> WeightsFolder:
    """Return the weights in a folder: its safetensors, or what ``torch.save`` wrote if it has none.

    Raises:
        UserError: see :class:`WeightsFolder`.
    """
    is_pickled = PickledFolder.is_in(folder) and not SafetensorsFolder.is_in(folder)
    return (PickledFolder if is_pickled else SafetensorsFolder)(folder, option)


def _what_else(folder: Path) -> str:
    """Return a hint at what a folder holds instead of safetensors with the usual names."""
    for patterns, hint in (
        (("model-*.safetensors",), "is a part; the index that belongs to it is missing"),
        (("adapter_model.*",), "is an adapter; merge it into its base first"),
        (("*.safetensors",), "has another name; from_pretrained would not take it either"),
        (("pytorch_model-*.bin",), "is a part; the index that belongs to it is missing"),
        (("*.bin",), "has another name; from_pretrained would not take it either"),
        (("*.pt", "*.pth"), "is a pickle, which is not read; save it as safetensors"),
        (("*.gguf",), "is not read; give the safetensors that it was made from"),
    ):
        names = sorted(path.name for pattern in patterns for path in folder.glob(pattern))
        if names:
            return f" ({names[0]} {hint})"
    return ""
