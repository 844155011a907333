"""Write a Megatron distributed checkpoint with one piece in memory at a time, without a model or a process group.

torch.distributed.checkpoint asks a planner for each item just before it writes the item. The planner here reads the
piece only then.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from megatron_cca.checkpoint.records import file_system_cause
from megatron_cca.megatron_compat.checkpoint_format import COMMON_STATE, FORMAT, FORMAT_FILE


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
