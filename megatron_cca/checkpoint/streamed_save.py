"""Write a Megatron distributed checkpoint with one piece in memory at a time, without a model or a process group.

torch.distributed.checkpoint asks a planner for each item just before it writes the item. The planner here reads the
piece only then.
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
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from tqdm import tqdm

from megatron_cca.checkpoint.layout import file_system_cause
from megatron_cca.megatron_compat import COMMON_STATE, FORMAT, FORMAT_FILE

PIECE_BYTES = 64 * 2**20


def row_ranges(shape: Sequence[int], dtype: torch.dtype, piece_bytes: int = PIECE_BYTES) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows that cover a tensor of this shape: at most ``piece_bytes`` each, at least one row."""
    rows = shape[0] if shape else 1
    row_bytes = math.prod(shape[1:]) * dtype.itemsize
    # Rows of no bytes all fit in one piece.
    step = max(1, piece_bytes // row_bytes if row_bytes else rows)
    yield from ((start, min(start + step, rows)) for start in range(0, rows, step))


def num_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Return the size of a tensor in bytes."""
    return math.prod(shape) * dtype.itemsize


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
