"""Read and write the tensors of Megatron distributed checkpoints by rows, without a model or a process group.

A checkpoint may have any layout. One piece is in memory at a time. When torch.distributed.checkpoint writes, it asks a
planner for each item just before, and the planner here reads the piece only then.
"""

from __future__ import annotations

import io
import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, LoadPlan
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from tqdm import tqdm

from megatron_cca.checkpoint.integrity import CheckpointIndex
from megatron_cca.checkpoint.layout import file_system_cause
from megatron_cca.errors import UserError
from megatron_cca.megatron_compat import COMMON_STATE, FORMAT, FORMAT_FILE

_MASTER = "optimizer.state.param."
# bf16 has 8 bits of precision. Master weights in fp16 share one scale, so the smallest of them lose more.
_OF_A_WEIGHT, _OF_THE_LARGEST = 2.0**-8, 2.0**-24


class StoredTensors(CheckpointIndex):
    """The tensors of one checkpoint folder, of which any rows can be read.

    Raises:
        UserError: see :func:`read_index`.
    """

    def __init__(self, folder: Path, key: str) -> None:
        super().__init__(folder, key)
        self._reader = FileSystemReader(folder)
        self._reader.set_up_storage_reader(self.index, is_coordinator=True)
        self._held: dict[MetadataIndex, Tensor] = {}

    def read(self, key: str, layer: int | None, start: int, stop: int) -> Tensor:
        """Return rows ``start .. stop`` of a tensor.

        Args:
            key: the tensor.
            layer: index of the layer if the tensor stacks layers, else None.
            start: first row.
            stop: row after the last one.

        Raises:
            UserError: a file is damaged. Names the file or the tensor.
        """
        tail = self.shape(key)[1 if layer is None else 2 :]
        if layer is None:
            return self.read_block(key, (start, *(0 for _ in tail)), (stop, *tail))
        return self.read_block(key, (layer, start, *(0 for _ in tail)), (layer + 1, stop, *tail))[0]

    def read_block(self, key: str, low: Sequence[int], high: Sequence[int]) -> Tensor:
        """Return the block of a global tensor from index ``low`` up to ``high``, exclusive. See :meth:`read`."""
        stored = self.tensors[key]
        shape = [b - a for a, b in zip(low, high, strict=True)]
        parts = [(chunk, *_overlap(chunk, low, high)) for chunk in stored.chunks]
        parts = [part for part in parts if all(a < b for a, b in zip(part[1], part[2], strict=True))]
        # Check this before memory is allocated for what the index claims.
        if sum(math.prod(b - a for a, b in zip(*part[1:], strict=True)) for part in parts) != math.prod(shape):
            raise UserError(f"{self.option}: {self.folder} does not hold all of {key}; choose another checkpoint")
        block, held = torch.empty(shape, dtype=stored.properties.dtype), {}
        for chunk, begin, end in parts:
            index = MetadataIndex(key, chunk.offsets)
            whole = self._held[index] if index in self._held else self._load(key, chunk)
            part = whole[_slices(begin, end, chunk.offsets)]
            block[_slices(begin, end, low)] = part
            if part.numel() < whole.numel():
                # Keep it: the next rows probably lie in it, too. Query, key and value share one tensor.
                held[index] = whole
        self._held = held
        return block

    def _load(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        index = MetadataIndex(key, chunk.offsets)
        whole = torch.empty(chunk.sizes, dtype=self.dtype(key))
        origin = torch.Size([0] * len(chunk.sizes))
        item = ReadItem(LoadItemType.TENSOR, index, origin, index, origin, chunk.sizes)
        try:
            self._reader.read_data(LoadPlan([item]), _Into(whole))
        except Exception as error:
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{self.option}: {key} in {self.folder} cannot be read, a file is damaged: {why}") from None
        return whole


def check_master_weights(stored: StoredTensors) -> None:
    """Refuse master weights that do not round to the weights. Reads one row each of the smallest tensors.

    Args:
        stored: the checkpoint. Without the state of a distributed optimizer, there is nothing to check.

    Raises:
        UserError: the master weights are wrong. Names the folder and how to use its weights.
    """
    names = [name for name in stored.names() if name.startswith(_MASTER) and name.removeprefix(_MASTER) in stored]
    for name in sorted(names, key=lambda name: math.prod(stored.shape(name))):
        master, weights = (_first_row(stored, one) for one in (name, name.removeprefix(_MASTER)))
        if not weights.any():
            # Adapters start at zero. Zeros prove nothing.
            continue
        if not _round_to(master, weights):
            raise UserError(
                f"{stored.option}: {stored.folder} cannot be resumed: its master weights are not those of its weights, "
                "as earlier versions saved them under optimizer.use_precision_aware_optimizer; its weights are whole: "
                f"start another run (training.output_dir) with training.pretrained_checkpoint={stored.folder}, and "
                "with reference.checkpoint at the weights that this run began with"
            )
        return


class ByteProgress:
    """Progress bar that counts bytes. A context manager."""

    def __init__(self, verb: str, total_bytes: int, *, shown: bool) -> None:
        self._bar = tqdm(
            total=total_bytes, desc=verb, unit="B", unit_scale=True, unit_divisor=1000, disable=None if shown else True
        )

    def __enter__(self) -> ByteProgress:
        return self

    def __exit__(self, *_unused) -> None:
        self._bar.close()

    def watch(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the same pieces, and count each after use."""
        for piece in pieces:
            yield piece
            self.count(piece)

    def watched(self, read: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Return a function that calls ``read`` and counts the tensor that it returns."""

        def reading() -> Tensor:
            piece = read()
            self.count(piece)
            return piece

        return reading

    def count(self, piece: Tensor) -> None:
        """Add the bytes of one piece to the bar."""
        self._bar.update(piece.nbytes)


@dataclass(frozen=True)
class Piece:
    """A block of a global tensor, and a function that reads it.

    Attributes:
        key: key of the global tensor.
        global_shape: shape of the global tensor.
        offsets: index of the block's first element.
        sizes: shape of the block.
        dtype: dtype of the block.
        read: returns the block's data. Called once.
    """

    key: str
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


def save_pieces(folder: Path, pieces: Sequence[Piece], objects: Mapping[str, Any] | None = None) -> None:
    """Write ``pieces`` as a checkpoint into an existing folder.

    Args:
        folder: folder of the checkpoint.
        pieces: pieces of all its tensors.
        objects: everything else to save, by Megatron's unique keys. :data:`COMMON_STATE` is added if it is missing.

    Raises:
        OSError: from the file system, such as a full disk.
    """
    planner = _PiecePlanner(pieces, {COMMON_STATE: {}, **(objects or {})})
    checksums = torch.serialization.get_crc32_options()
    # zip's checksums take longer than everything else, and no reader checks them.
    torch.serialization.set_crc32_options(False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.save({}, storage_writer=dcp.FileSystemWriter(folder), planner=planner, no_dist=True)
    except CheckpointException as error:
        raise file_system_cause(next(iter(error.failures.values()))[0]) from None
    finally:
        torch.serialization.set_crc32_options(checksums)
    (folder / FORMAT_FILE).write_text(json.dumps(FORMAT))


class _PiecePlanner(dcp.DefaultSavePlanner):
    def __init__(self, pieces: Sequence[Piece], objects: Mapping[str, Any]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._objects = objects
        self._pieces = {MetadataIndex(piece.key, piece.offsets): piece for piece in pieces}

    def create_local_plan(self) -> SavePlan:
        objects = [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in self._objects]
        self.plan = SavePlan([*objects, *(_write_item(index, piece) for index, piece in self._pieces.items())])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            content = io.BytesIO()
            torch.save([self._objects[write_item.index.fqn]], content)
            return content
        piece = self._pieces[write_item.index]
        return piece.read().view(piece.sizes)


def _write_item(index: MetadataIndex, piece: Piece) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.sizes))
    data = TensorWriteData(chunk, TensorProperties(dtype=piece.dtype), torch.Size(piece.global_shape))
    return WriteItem(index, WriteItemType.SHARD, tensor_data=data)


def _overlap(chunk: ChunkStorageMetadata, low: Sequence[int], high: Sequence[int]) -> tuple[list[int], list[int]]:
    begin = [max(a, offset) for a, offset in zip(low, chunk.offsets, strict=True)]
    end = [min(b, o + size) for b, o, size in zip(high, chunk.offsets, chunk.sizes, strict=True)]
    return begin, end


def _slices(begin: Sequence[int], end: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(begin, end, origin, strict=True))


class _Into(DefaultLoadPlanner):
    """Planner that lets torch's reader write into one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self.target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        return self.target

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass


def _first_row(stored: StoredTensors, name: str) -> torch.Tensor:
    shape = stored.shape(name)
    return stored.read_block(name, [0] * len(shape), [*(1 for _ in shape[:-1]), *shape[-1:]]).double()


def _round_to(master: torch.Tensor, weights: torch.Tensor) -> bool:
    allowed = _OF_A_WEIGHT * weights.abs() + _OF_THE_LARGEST * weights.abs().max()
    return bool(((master - weights).abs() <= allowed).all())
