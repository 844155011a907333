"""Write folders of safetensors, with one file or with several and an index, piece by piece."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from megatron_cca.models.weight_files import INDEX, SINGLE, num_bytes
from megatron_cca.models.weights_folder import DTYPE_NAMES

MAX_SHARD_BYTES = 5 * 10**9


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
        header[tensor.name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        position = end
    return header


def _write_tensor(file: BinaryIO, tensor: OutgoingTensor) -> None:
    written = 0
    for piece in tensor.pieces:
        assert piece.dtype == tensor.dtype, f"{tensor.name}: {piece.dtype} instead of {tensor.dtype}"
        file.write(piece.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        written += piece.numel()
    assert written == math.prod(tensor.shape), f"{tensor.name}: {written} of {math.prod(tensor.shape)} elements"
