"""Check that a checkpoint is undamaged: compare the content of each file with its recorded checksum."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_cca.checkpoint import layout
from megatron_cca.checkpoint.stored_tensors import StoredTensors
from megatron_cca.errors import UserError
from megatron_cca.parallel.ranks import attempted_on_rank_0, described, first_problem

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
