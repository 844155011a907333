"""Read the index of a Megatron distributed checkpoint, and find the checkpoints whose files are undamaged.

Such a checkpoint is a ``torch.distributed.checkpoint`` folder. Its index, ``.metadata``, is a pickle. The unpickler
here knows only the classes of an index. Everything in the index is checked before use.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

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
# Policy and reference often load one checkpoint. An unchanged file is read only once.
_known_good: set[tuple] = set()


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


class CheckpointIndex:
    """The names, shapes and dtypes of the tensors of one checkpoint folder.

    Attributes:
        folder: the checkpoint's own folder.
        option: the key or option that named it, for messages.
        index: see :func:`read_index`.
        tensors: its entries of tensors, by key.
        objects: keys of everything in it that is not a tensor.

    Raises:
        UserError: see :func:`read_index`.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = folder
        self.option = key
        self.index = index = read_index(folder, key)
        self.tensors = {
            name: found for name, found in index.state_dict_metadata.items() if isinstance(found, TensorStorageMetadata)
        }
        self.objects = index.state_dict_metadata.keys() - self.tensors.keys()

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def names(self) -> list[str]:
        """Return the keys of all tensors."""
        return list(self.tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the global shape. Layers are stacked on the first axis."""
        return tuple(self.tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        """Return the dtype in the file."""
        return self.tensors[key].properties.dtype


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


def _is_harmless(module: str, name: str) -> bool:
    is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
    return is_dtype or name in _HARMLESS.get(module, ())


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
