"""Safetensors folders, with one file or with several and an index. Reads use memory maps. Writes go piece by piece."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_cca.checkpoint.huggingface.weights_folder import TensorInfo, WeightsFolder
from megatron_cca.checkpoint.stored_tensors import num_bytes
from megatron_cca.errors import UserError, first_line
from megatron_cca.io.file_contents import UTF_16, kind_hint
from megatron_cca.models.weight_files import INDEX, SINGLE

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


def has_dtype(dtype: torch.dtype) -> bool:
    """Return whether tensors of a dtype can be written."""
    return dtype in _NAMES


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
