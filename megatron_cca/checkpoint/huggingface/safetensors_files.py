"""Safetensors folders, with one file or with several and an index. Reads use memory maps. Writes go piece by piece."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_cca.checkpoint.stored_tensors import num_bytes, row_ranges
from megatron_cca.errors import UserError, error_context, first_line, shortened
from megatron_cca.io.external_files import is_file_name
from megatron_cca.io.file_contents import UTF_16, kind_hint
from megatron_cca.models.weight_files import INDEX, SINGLE, unwrapped

MAX_SHARD_BYTES = 5 * 10**9

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
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


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


class SafetensorsFolder:
    """The tensors of ``model.safetensors``, or of the files that ``model.safetensors.index.json`` names.

    Attributes:
        tensors: the tensors, by name without the parts that wrappers add.

    Args:
        folder: the folder.
        option: the command-line option that named the folder, for messages.

    Raises:
        UserError: a file is missing, truncated or unreadable, or a tensor is not where the index says. Names it.
    """

    def __init__(self, folder: Path, option: str) -> None:
        self.option = option
        # A folder may have both. This is transformers' order.
        has_index = (folder / INDEX).is_file() and not (folder / SINGLE).is_file()
        found = self._scan_index(folder) if has_index else self._scan_single(folder)
        with error_context(f"{option}: {folder}"):
            self.tensors = {name: found[stored] for name, stored in unwrapped(found).items()}

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows ``start .. stop`` as a view of a memory map, or the whole tensor if it is a scalar."""
        return self.read_info(self.tensors[name], start, stop)

    def read_info(self, info: TensorInfo, start: int = 0, stop: int | None = None) -> Tensor:
        """Do the same as :meth:`read`, but for a :class:`TensorInfo` instead of a name."""
        # Open the file each time. A map that stays open keeps all pages that were read in the resident set.
        with safe_open(info.file, framework="pt") as file:
            return file.get_slice(info.name)[start:stop] if info.shape else file.get_tensor(info.name)

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

    def _scan_single(self, folder: Path) -> dict[str, TensorInfo]:
        if not (folder / SINGLE).is_file():
            raise UserError(f"{self.option}: {folder} has neither {SINGLE} nor {INDEX}{_what_else(folder)}")
        return self._scan_file(folder / SINGLE)

    def _scan_index(self, folder: Path) -> dict[str, TensorInfo]:
        path = folder / INDEX
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
                raise UserError(f"{self.option}: {folder / file} is missing, but {INDEX} names it")
        found = {}
        for file in files:
            for name, info in self._scan_file(folder / file).items():
                if name in found:
                    raise UserError(f"{self.option}: tensor {name} is in {found[name].file.name} and in {file}")
                found[name] = info
        for name, file in wanted.items():
            if name not in found or found[name].file.name != file:
                raise UserError(f"{self.option}: tensor {name} is not in {folder / file}, where {INDEX} says it is")
        return found

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
                        raise UserError(f"{self.option}: tensor {name} in {path} has dtype {dtype}, which is not known")
                    shape = tuple(part.get_shape())
                    if max(shape, default=0) > _MAX_SIZE:
                        raise UserError(f"{self.option}: tensor {name} in {path} claims the shape {list(shape)}")
                    found[name] = TensorInfo(path, name, shape, _DTYPES[dtype])
        except (SafetensorError, OSError) as error:
            # A header's length looks like UTF-16.
            why = kind_hint(path, but=[UTF_16]) or f": {first_line(error)}"
            raise UserError(f"{self.option}: {path} is truncated or not a safetensors file{why}") from None
        return found


def _what_else(folder: Path) -> str:
    """Return a hint at what a folder holds instead of safetensors with the usual names."""
    for patterns, hint in (
        (("model-*.safetensors",), "is a part; the index that belongs to it is missing"),
        (("adapter_model.*",), "is an adapter; merge it into its base first"),
        (("*.safetensors",), "has another name; from_pretrained would not take it either"),
        (("*.bin", "*.pt", "*.pth"), "is a pickle, which is not read; save it as safetensors"),
        (("*.gguf",), "is not read; give the safetensors that it was made from"),
    ):
        names = sorted(path.name for pattern in patterns for path in folder.glob(pattern))
        if names:
            return f" ({names[0]} {hint})"
    return ""


@dataclass(frozen=True)
class OutgoingTensor:
    """A tensor to write, and its pieces from the first row to the last."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Iterable[Tensor]

    @property
    def num_bytes(self) -> int:
        """Size of the tensor in bytes."""
        return num_bytes(self.shape, self.dtype)


def write_safetensors(folder: Path, tensors: Iterable[OutgoingTensor], max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write ``model.safetensors``, or shards of at most ``max_shard_bytes`` with an index, as transformers does.

    ``safetensors.torch.save_file`` needs whole tensors in memory. This function holds one piece at a time.

    Raises:
        OSError: from the file system, such as a full disk.
    """
    shards = _split(tensors, max_shard_bytes)
    if len(shards) == 1:
        _write_file(folder / SINGLE, shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / file, shard)
        weight_map |= {tensor.name: file for tensor in shard}
    size = sum(tensor.num_bytes for shard in shards for tensor in shard)
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _split(tensors: Iterable[OutgoingTensor], max_shard_bytes: int) -> list[list[OutgoingTensor]]:
    shards: list[list[OutgoingTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.num_bytes
    return shards


def _write_file(path: Path, tensors: list[OutgoingTensor]) -> None:
    # Wide dtypes come first, so that every tensor begins at a multiple of its item size.
    tensors = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header = json.dumps(_header(tensors), separators=(",", ":")).encode()
    # The format requires that the data begin at a multiple of eight bytes.
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for tensor in tensors:
            _write_tensor(file, tensor)
        file.flush()
        os.fsync(file.fileno())


def _header(tensors: list[OutgoingTensor]) -> Mapping:
    header: dict = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        end = position + tensor.num_bytes
        offsets = [position, end]
        header[tensor.name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        position = end
    return header


def _write_tensor(file: BinaryIO, tensor: OutgoingTensor) -> None:
    written = 0
    for piece in tensor.pieces:
        assert piece.dtype == tensor.dtype, f"{tensor.name}: {piece.dtype} instead of {tensor.dtype}"
        file.write(piece.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        written += piece.numel()
    assert written == math.prod(tensor.shape), f"{tensor.name}: {written} of {math.prod(tensor.shape)} elements"
