"""Read rows of tensors from a Megatron distributed checkpoint of any layout, and check that its files are undamaged.

Such a checkpoint is a ``torch.distributed.checkpoint`` folder. Its index, ``.metadata``, is a pickle. The unpickler
here knows only the classes of an index. Everything in the index is checked before use.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, LoadPlan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from megatron_cca.checkpoint import layout
from megatron_cca.errors import UserError
from megatron_cca.io.external_files import file_below
from megatron_cca.io.pickles import unpickled
from megatron_cca.parallel.ranks import attempted_on_rank_0, described, first_problem

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


# Policy and reference often load one checkpoint. An unchanged file is read only once.
_known_good: set[tuple] = set()
_MASTER = "optimizer.state.param."
# bf16 has 8 bits of precision. Master weights in fp16 share one scale, so the smallest of them lose more.
_OF_A_WEIGHT, _OF_THE_LARGEST = 2.0**-8, 2.0**-24


def check_whole(folder: Path, key: str) -> dict:
    """Refuse a checkpoint with a damaged file. Reads every byte.

    Args:
        folder: the checkpoint's own folder.
        key: the key or option that named the checkpoint, for messages.

    Returns:
        The summary of the checkpoint.

    Raises:
        UserError: see :func:`layout.read_summary`; also if a file's content is not what was written. Names the file.
    """
    summary = layout.read_summary(folder, key)
    _check_contents(folder, key, summary["files"], summary["files"])
    return summary


def check_whole_together(folder: Path, key: str) -> str | None:
    """Return what is wrong with a checkpoint, or None. Each rank reads its share. Collective over all ranks."""
    return first_problem(_problem(folder, key, dist.get_rank(), dist.get_world_size()))


def _problem(folder: Path, key: str, rank: int, ranks: int) -> str | None:
    try:
        files = layout.read_summary(folder, key)["files"]
        # Ranks take turns, the largest file first, so that all read about as many bytes.
        names = sorted(files, key=lambda name: -files[name]["bytes"])[rank::ranks]
        _check_contents(folder, key, files, names)
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"{key}: {described(error)}"
    return None


def _check_contents(folder: Path, key: str, files: dict[str, dict], names: Collection[str]) -> None:
    identities = {name: _identity(folder / name, files[name]["xxh3"]) for name in names}
    unknown = [name for name in names if identities[name] not in _known_good]
    for name, found in layout.checksums(folder, unknown).items():
        if found != files[name]["xxh3"]:
            raise UserError(f"{key}: {folder / name} is damaged: not what was written; choose another checkpoint")
        _known_good.add(identities[name])


def _identity(path: Path, expected: str) -> tuple:
    state = path.stat()
    return (str(path.resolve()), state.st_ino, state.st_mtime_ns, state.st_ctime_ns, state.st_size, expected)


@dataclass(frozen=True)
class Newest:
    """The checkpoint that a run continues from.

    Attributes:
        iteration: number of completed steps of this checkpoint.
        passed_over: why newer checkpoints or the latest-file were ignored, one line for each.
    """

    iteration: int
    passed_over: tuple[str, ...]


def newest_whole(root: Path, key: str) -> Newest | None:
    """Return the newest undamaged checkpoint below ``root``, or None if there is none. Collective over all ranks.

    Raises:
        UserError: checkpoints exist, but all are damaged. Names the damage of the newest one.
    """
    listed, problem = attempted_on_rank_0(lambda: _tidied(root, key))
    if problem is not None:
        raise UserError(f"{key}: {problem}")
    numbers, latest = listed
    passed_over: list[str] = []
    for number in reversed(numbers):
        problem = check_whole_together(layout.iteration_folder(root, number), key)
        if problem is None:
            return Newest(number, (*passed_over, *_disagreement(root, latest, number, passed_over)))
        passed_over.append(problem)
    if passed_over or latest is not None:
        first = passed_over[0] if passed_over else f"{key}: {root / layout.LATEST} names a checkpoint that is gone"
        raise UserError(f"{first}; none of {root} is whole: restore one, or choose another training.output_dir")
    return None


def _tidied(root: Path, key: str) -> tuple[list[int], int | str | None]:
    layout.tidy(root)
    return layout.iterations(root), _said_latest(root, key)


def _said_latest(root: Path, key: str) -> int | str | None:
    """Return the iteration in the latest-file, what is wrong with the file, or None if there is no file."""
    try:
        return layout.latest_iteration(root)
    except UserError as error:
        return f"{key}: {error}"


def _disagreement(root: Path, latest: int | str | None, number: int, passed_over: list[str]) -> list[str]:
    if isinstance(latest, str):
        return [latest]
    if latest == number or (passed_over and latest is not None and latest > number):
        return []
    said = "is missing" if latest is None else f"says {latest}"
    return [
        f"{root / layout.LATEST} {said}, {layout.iteration_folder(root, number).name} is the newest whole checkpoint "
        "and is taken; to go back, remove the newer ones"
    ]


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


def _first_row(stored: StoredTensors, name: str) -> torch.Tensor:
    shape = stored.shape(name)
    return stored.read_block(name, [0] * len(shape), [*(1 for _ in shape[:-1]), *shape[-1:]]).double()


def _round_to(master: torch.Tensor, weights: torch.Tensor) -> bool:
    allowed = _OF_A_WEIGHT * weights.abs() + _OF_THE_LARGEST * weights.abs().max()
    return bool(((master - weights).abs() <= allowed).all())
