"""Read a Megatron distributed checkpoint's tensors by rows, whatever layout wrote it; no Megatron, no process group.

Such a checkpoint is a ``torch.distributed.checkpoint`` folder. Its index, ``.metadata``, is a pickle; it is read here
by an unpickler that knows the index's own classes and no others.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, LoadPlan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from megatron_cca.errors import UserError

INDEX = ".metadata"

# Plain data and functions that look a name up in a table; Megatron keeps its plan for writing in the index as well.
_HARMLESS = {
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
}


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if name not in _HARMLESS.get(module, ()) and not is_dtype:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint index needs")
        return super().find_class(module, name)


def read_index(folder: Path, key: str) -> Metadata:
    """A checkpoint's index.

    Raises:
        UserError: no index, a damaged one, or one that would run code; names the file.
    """
    path = folder / INDEX
    try:
        with path.open("rb") as file:
            index = _IndexUnpickler(file).load()
    except FileNotFoundError:
        raise UserError(f"{key}: {path} is missing: not a Megatron distributed checkpoint; choose another") from None
    except Exception as error:
        raise UserError(f"{key}: {path} is damaged or not a checkpoint's index: {error}") from None
    tables = (getattr(index, "state_dict_metadata", None), getattr(index, "storage_data", None))
    if not isinstance(index, Metadata) or not all(isinstance(table, dict) for table in tables):
        raise UserError(f"{key}: {path} is not a checkpoint's index; choose another checkpoint")
    return index


class StoredTensors:
    """The tensors of one checkpoint folder.

    Attributes:
        objects: keys of everything in it that is not a tensor.

    Raises:
        UserError: see :func:`read_index`.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = folder
        self.option = key
        index = read_index(folder, key)
        self._reader = FileSystemReader(folder)
        self._reader.set_up_storage_reader(index, is_coordinator=True)
        self._tensors = {
            name: found for name, found in index.state_dict_metadata.items() if isinstance(found, TensorStorageMetadata)
        }
        self.objects = index.state_dict_metadata.keys() - self._tensors.keys()
        self._held: dict[MetadataIndex, Tensor] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    def names(self) -> list[str]:
        """Keys of all tensors."""
        return list(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        """Global shape; layers are stacked on the first axis."""
        return tuple(self._tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        """As stored."""
        return self._tensors[key].properties.dtype

    def read(self, key: str, layer: int | None, start: int, stop: int) -> Tensor:
        """Rows ``start .. stop`` of a tensor, or of one layer's where layers are stacked.

        Raises:
            UserError: a damaged file; names it or the tensor.
        """
        tail = self.shape(key)[1 if layer is None else 2 :]
        if layer is None:
            return self.read_block(key, (start, *(0 for _ in tail)), (stop, *tail))
        return self.read_block(key, (layer, start, *(0 for _ in tail)), (layer + 1, stop, *tail))[0]

    def read_block(self, key: str, low: Sequence[int], high: Sequence[int]) -> Tensor:
        """The block of a global tensor from index ``low`` up to ``high``; see :meth:`read`."""
        stored = self._tensors[key]
        block = torch.empty([b - a for a, b in zip(low, high, strict=True)], dtype=stored.properties.dtype)
        filled, held = 0, {}
        for chunk in stored.chunks:
            begin, end = _overlap(chunk, low, high)
            if any(a >= b for a, b in zip(begin, end, strict=True)):
                continue
            index = MetadataIndex(key, chunk.offsets)
            whole = self._held[index] if index in self._held else self._load(key, chunk)
            part = whole[_slices(begin, end, chunk.offsets)]
            block[_slices(begin, end, low)] = part
            filled += part.numel()
            if part.numel() < whole.numel():
                # The next rows are likely to come from it as well: query, key and value lie in one.
                held[index] = whole
        self._held = held
        if filled != block.numel():
            raise UserError(f"{self.option}: {self.folder} does not hold all of {key}; choose another checkpoint")
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


def _overlap(chunk: ChunkStorageMetadata, low: Sequence[int], high: Sequence[int]) -> tuple[list[int], list[int]]:
    begin = [max(a, offset) for a, offset in zip(low, chunk.offsets, strict=True)]
    end = [min(b, o + size) for b, o, size in zip(high, chunk.offsets, chunk.sizes, strict=True)]
    return begin, end


def _slices(begin: Sequence[int], end: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(begin, end, origin, strict=True))


class _Into(DefaultLoadPlanner):
    """Lets torch's reader write into one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self.target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        return self.target

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass
