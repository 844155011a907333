"""Read rows of tensors from a Megatron distributed checkpoint of any layout. Needs no Megatron and no process group.

Such a checkpoint is a ``torch.distributed.checkpoint`` folder. Its index, ``.metadata``, is a pickle. The unpickler
here knows only the classes of an index. Everything in the index is checked before use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, LoadPlan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from megatron_cca.errors import UserError
from megatron_cca.io.external_files import file_below
from megatron_cca.io.pickles import unpickled

INDEX = ".metadata"

# Classes of plain data, and functions that look up a name in a table. Megatron's index also holds its save plan.
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


def _is_harmless(module: str, name: str) -> bool:
    is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
    return is_dtype or name in _HARMLESS.get(module, ())


def read_index(folder: Path, key: str) -> Metadata:
    """Read a checkpoint's index, and check that its data lie in files of the folder that are large enough.

    Raises:
        UserError: the index is missing or damaged, would run code, or names a file outside of the folder. Names the
            file.
    """
    path = folder / INDEX
    try:
        index = unpickled(path.read_bytes(), _is_harmless)
    except FileNotFoundError:
        raise UserError(f"{key}: {path} is missing: not a Megatron distributed checkpoint; choose another") from None
    except Exception as error:
        raise UserError(f"{key}: {path} is damaged or not a checkpoint's index: {error}") from None
    tables = (getattr(index, "state_dict_metadata", None), getattr(index, "storage_data", None))
    if not isinstance(index, Metadata) or not all(isinstance(table, dict) for table in tables):
        raise UserError(f"{key}: {path} is not a checkpoint's index; choose another checkpoint")
    try:
        _check_places(folder, index)
    except UserError as error:
        raise UserError(f"{key}: {path}: {error}; choose another checkpoint") from None
    # A damaged index can have a wrong type anywhere, which can raise anything.
    except Exception as error:
        why = str(error) or type(error).__name__
        raise UserError(f"{key}: {path} is damaged or not a checkpoint's index: {why}") from None
    return index


def _check_places(folder: Path, index: Metadata) -> None:
    names = {place.relative_path for place in index.storage_data.values()}
    sizes = {name: file_below(folder, name).stat().st_size for name in names}
    for where, place in index.storage_data.items():
        if place.offset < 0 or place.length < 0 or place.offset + place.length > sizes[place.relative_path]:
            raise UserError(f"{place.relative_path} is too short for {where.fqn}")
        if getattr(place, "transform_descriptors", None):
            raise UserError(f"{where.fqn} is transformed in a way that is not read")
    for name, tensor in index.state_dict_metadata.items():
        if isinstance(tensor, TensorStorageMetadata):
            _check_tensor(name, tensor, index)


def _check_tensor(name: str, tensor: TensorStorageMetadata, index: Metadata) -> None:
    """Check the sizes in the index before memory is allocated for them."""
    width, size = tensor.properties.dtype.itemsize, torch.Size(tensor.size)
    for chunk in tensor.chunks:
        offsets, sizes = torch.Size(chunk.offsets), torch.Size(chunk.sizes)
        if any(a < 0 or b < 0 or a + b > c for a, b, c in zip(offsets, sizes, size, strict=True)):
            raise UserError(f"a part of {name} lies outside it")
        place = index.storage_data.get(MetadataIndex(name, offsets))
        if place is None or math.prod(sizes) * width > place.length:
            raise UserError(f"a part of {name} is not there, or is smaller than it says")


class StoredTensors:
    """The tensors of one checkpoint folder.

    Attributes:
        folder: the checkpoint's own folder.
        option: the key or option that named it, for messages.
        index: see :func:`read_index`.
        objects: keys of everything in it that is not a tensor.

    Raises:
        UserError: see :func:`read_index`.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = folder
        self.option = key
        self.index = index = read_index(folder, key)
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
        """Return the keys of all tensors."""
        return list(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the global shape. Layers are stacked on the first axis."""
        return tuple(self._tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        """Return the dtype in the file."""
        return self._tensors[key].properties.dtype

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
        stored = self._tensors[key]
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
