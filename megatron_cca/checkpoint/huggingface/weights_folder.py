"""Folders of weights as ``from_pretrained`` takes them: one file, or several and an index."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from megatron_cca.checkpoint.stored_tensors import num_bytes, row_ranges
from megatron_cca.errors import UserError, error_context, shortened
from megatron_cca.io.external_files import is_file_name
from megatron_cca.models.weight_files import unwrapped


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
        option: the command-line option that named the folder, for messages.

    Raises:
        UserError: a file is missing, truncated or unreadable, or a tensor is not where the index says. Names it.
    """

    single: ClassVar[str]
    index: ClassVar[str]

    def __init__(self, folder: Path, option: str) -> None:
        self.option = option
        # A folder may have both. This is transformers' order.
        has_index = (folder / self.index).is_file() and not (folder / self.single).is_file()
        found = self._scan_index(folder) if has_index else self._scan_single(folder)
        with error_context(f"{option}: {folder}"):
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
            raise UserError(f"{self.option}: {folder} has neither {self.single} nor {self.index}{_what_else(folder)}")
        return self._scan_file(folder / self.single)

    def _scan_index(self, folder: Path) -> dict[str, TensorInfo]:
        path = folder / self.index
        try:
            wanted = json.loads(path.read_text())["weight_map"]
            files = sorted(set(wanted.values()))
            if not all(isinstance(file, str) for file in files):
                raise TypeError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{self.option}: {path} is damaged: expected JSON with a weight_map") from None
        for file in files:
            if not is_file_name(file):
                raise UserError(
                    f"{self.option}: {path} names {shortened(repr(file), 80)}, which is not a file of the same folder"
                )
            if not (folder / file).is_file():
                raise UserError(f"{self.option}: {folder / file} is missing, but {self.index} names it")
        found = {}
        for file in files:
            for name, info in self._scan_file(folder / file).items():
                if name in found:
                    raise UserError(f"{self.option}: tensor {name} is in {found[name].file.name} and in {file}")
                found[name] = info
        for name, file in wanted.items():
            if name not in found or found[name].file.name != file:
                raise UserError(
                    f"{self.option}: tensor {name} is not in {folder / file}, where {self.index} says it is"
                )
        return found


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
