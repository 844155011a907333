"""Log-probabilities of a frozen reference on disk, by step and row of the global batch.

    <folder>/cache.json                          what they are the log-probabilities of
    <folder>/training_000000128_000000191.npz    of these steps: float32 [steps, global batch, 2], positives, negatives
    <folder>/validation_000000000_000000003.npz

A batch is a pure function of (data, seed, step), so that a row needs no name. Each block is written under a hidden name
and renamed. The checksums of zip guard its contents.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_cca.config.former import values_without
from megatron_cca.errors import UserError
from megatron_cca.io.file_contents import archived_arrays
from megatron_cca.io.outputs import OPTION, file_system_errors, whole_file

Split = Literal["training", "validation"]
BLOCK = 64

_FORMAT = "megatron_cca reference log-probabilities, version 1"
_MANIFEST = "cache.json"
_TOOL = "megatron-cca cache-reference"
_KEY = "reference.cache"
_BLOCK_NAME = re.compile(r"[a-z]+_(\d{9,18})_(\d{9,18})\.npz", re.ASCII)
_NO_BLOCK = (Path(), 0)


class ReferenceCache:
    """A folder of log-probabilities, open for reading.

    Args:
        folder: what ``megatron-cca cache-reference`` wrote.

    Attributes:
        identity: everything that the numbers depend on, by its configuration key or in words.
        path: what decides on their last bits only.

    Raises:
        UserError: no such cache, or a damaged manifest.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        manifest = _read_manifest(folder, _KEY)
        if manifest is None:
            raise UserError(f"{_KEY}: {folder} holds no {_MANIFEST}; compute a cache with {_TOOL}")
        self.identity: dict[str, Any] = manifest["identity"]
        self.path: dict[str, Any] = manifest["path"]
        self._block: tuple[tuple[str, int], np.ndarray] | None = None

    def check(self, identity: Mapping[str, Any]) -> None:
        """Refuse a cache of another run.

        Raises:
            UserError: names the first thing that differs.
        """
        difference = _difference(self.identity, identity)
        if difference:
            raise UserError(f"{_KEY}: {self.folder} was computed with {difference}; compute one for it ({_TOOL})")

    def check_steps(self, split: Split, first: int, last: int) -> None:
        """Refuse a cache that lacks one of the steps ``first .. last - 1``.

        Raises:
            UserError: says which it has and how to compute the rest.
        """
        blocks = finished_blocks(self.folder, split)
        missing = [step for step in range(first, last) if step >= blocks.get(step // BLOCK, _NO_BLOCK)[1]]
        if not missing:
            return
        raise UserError(
            f"{_KEY}: {self.folder} holds {split} steps {_ranges(blocks)}, this run needs {first} to {last - 1}; "
            f"compute the rest with {_TOOL} --steps {missing[0]}:{last}"
        )

    def read(self, split: Split, step: int) -> np.ndarray:
        """Return the log-probabilities of one global batch, in nats: float32 ``[B, 2]``, positives and negatives.

        Raises:
            UserError: a missing or damaged block; names the file.
        """
        name = split, step // BLOCK
        if self._block is None or self._block[0] != name:
            path, end = finished_blocks(self.folder, split).get(name[1], _NO_BLOCK)
            self._block = name, self._load(path) if step < end else np.empty((0, 0, 2), np.float32)
        block = self._block[1]
        if step % BLOCK >= len(block):
            raise UserError(f"{_KEY}: {self.folder} lacks {split} step {step}; compute it with {_TOOL}")
        return block[step % BLOCK]

    def _load(self, path: Path) -> np.ndarray:
        try:
            block = archived_arrays(path, {"logps"}).get("logps", np.empty(0))
        except UserError as error:
            raise UserError(f"{_KEY}: {path} is missing or damaged ({error}); delete it and run {_TOOL}") from None
        first, last = map(int, _BLOCK_NAME.fullmatch(path.name).groups())
        if block.dtype != np.float32 or block.ndim != 3 or block.shape[::2] != (last - first + 1, 2):
            raise UserError(f"{_KEY}: {path} is damaged: {block.dtype} {block.shape}; delete it and run {_TOOL}")
        return block


class ReferenceCacheWriter:
    """A writer of a cache, block by block. Blocks that a former attempt finished stay.

    Args:
        folder: claimed by this process; empty, or a cache of the same identity and path.
        identity, path: see :class:`ReferenceCache`.

    Raises:
        UserError: a folder with something else in it, or with a cache of another run.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], path: Mapping[str, Any]) -> None:
        self.folder = folder
        manifest = _read_manifest(folder, OPTION)
        if manifest is None:
            held = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
            if held:
                raise UserError(f"{OPTION}: {folder} holds {held[0]}, which is no cache; give an empty or new folder")
            text = json.dumps({"format": _FORMAT, "identity": dict(identity), "path": dict(path)}, indent=1)
            _write(folder / _MANIFEST, lambda file: file.write(text.encode()))
            return
        difference = _difference({**manifest["identity"], **manifest["path"]}, {**identity, **path})
        if difference:
            raise UserError(f"{OPTION}: {folder} holds a cache computed with {difference}; give another folder")

    def write(self, split: Split, first: int, logps: np.ndarray) -> None:
        """Write a block: float32 ``[steps, B, 2]`` from step ``first``, a multiple of ``BLOCK``, that many at most."""
        assert first % BLOCK == 0 and len(logps) <= BLOCK and logps.dtype == np.float32
        shorter = finished_blocks(self.folder, split).get(first // BLOCK)
        path = self.folder / f"{split}_{first:09d}_{first + len(logps) - 1:09d}.npz"
        _write(path, lambda file: np.savez(file, logps=logps))
        if shorter is not None and shorter[0] != path:
            shorter[0].unlink()


def finished_blocks(folder: Path, split: Split) -> dict[int, tuple[Path, int]]:
    """Return each block's file and the first step after it, by the number of the block."""
    blocks: dict[int, tuple[Path, int]] = {}
    for path in sorted(folder.glob(f"{split}_*.npz")):
        if found := _BLOCK_NAME.fullmatch(path.name):
            first, last = map(int, found.groups())
            if first % BLOCK == 0 and first <= last < first + BLOCK:
                blocks[first // BLOCK] = path, last + 1
    return blocks


def _read_manifest(folder: Path, key: str) -> dict | None:
    path = folder / _MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text())
        parts = (manifest["identity"], manifest["path"])
        whole = manifest["format"] == _FORMAT and all(isinstance(part, dict) for part in parts)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise UserError(f"{key}: {path} is damaged or of another version; compute the cache anew ({_TOOL})")
    return manifest


def _difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    # A cache of a former version does not name a key that came later.
    unnamed = values_without()
    for name in sorted(theirs.keys() | ours.keys()):
        old, new = (one.get(name, unnamed.get(name)) for one in (theirs, ours))
        if old != new:
            return f"{name} {_plain(old)}, not with this run's {_plain(new)}"
    return ""


def _plain(value: Any) -> str:
    return "none" if value is None else str(value)


def _ranges(blocks: Mapping[int, tuple[Path, int]]) -> str:
    runs: list[list[int]] = []
    for number, (_, end) in sorted(blocks.items()):
        if runs and runs[-1][1] == number * BLOCK:
            runs[-1][1] = end
        else:
            runs.append([number * BLOCK, end])
    return ", ".join(f"{first} to {end - 1}" for first, end in runs) or "none"


def _write(path: Path, fill) -> None:
    with file_system_errors(path.parent), whole_file(path) as partial, partial.open("wb") as file:
        fill(file)
