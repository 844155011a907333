"""A folder of token shards: VQ codes and caption tokens in Megatron's indexed format, with a manifest.

codes.bin codes.idx        visual codes, uint16, one sequence of H * W a sample
captions.bin captions.idx  caption tokens, int32
grids.npy                  int32 [N, 2], height and width of the code grid
condition_ids.npy          int64 [N], equal where two samples have the same condition (optional)
tokenizer.json codebook.npy ...  what is needed to read the tokens back
manifest.json              counts, vocabulary fingerprint, grid sizes in words, size and sha256 of every file
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_cca.errors import UserError
from megatron_cca.models.emu3.grammar import grid_text
from megatron_cca.models.emu3.vocabulary import Emu3Vocabulary

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Sample:
    """One tokenised image: ``codes`` int ``[H, W]``, ``caption`` int ``[T]``, and an optional condition id."""

    codes: np.ndarray
    caption: np.ndarray
    condition_id: int | None = None


def write_shards(
    folder: Path,
    samples: Iterable[Sample],
    vocabulary: Emu3Vocabulary,
    encode_text: Callable[[str], list[int]],
    write_extras: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write a shard folder; it appears under its name only when it is whole.

    Args:
        folder: must not exist yet.
        samples: in the order that their ids count.
        vocabulary: what the tokens mean.
        encode_text: the text tokenizer, for the grid sizes in words.
        write_extras: adds further files (tokenizer, codebook) to the folder it is given.

    Raises:
        UserError: a code or caption token outside the vocabulary; names the sample.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        grids = _write_tokens(partial, samples, vocabulary)
        write_extras(partial)
        _write_manifest(partial, grids, vocabulary, encode_text)
        partial.chmod(0o755)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_tokens(index: int, sample: Sample, vocabulary: Emu3Vocabulary) -> None:
    for what, tokens, size, of in (
        ("visual code", sample.codes, vocabulary.codebook_size, "codebook"),
        ("caption token", sample.caption, vocabulary.text_size, "text vocabulary"),
    ):
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < size:
            wrong = tokens.max() if tokens.max() >= size else tokens.min()
            raise UserError(f"sample {index}: {what} {wrong} does not fit a {of} of {size}")


def _write_tokens(folder: Path, samples: Iterable[Sample], vocabulary: Emu3Vocabulary) -> np.ndarray:
    codes = IndexedDatasetBuilder(str(folder / "codes.bin"), dtype=np.uint16)
    captions = IndexedDatasetBuilder(str(folder / "captions.bin"), dtype=np.int32)
    grids, condition_ids = [], []
    for index, sample in enumerate(samples):
        _check_tokens(index, sample, vocabulary)
        for builder, tokens in ((codes, sample.codes), (captions, sample.caption)):
            builder.add_item(torch.from_numpy(np.ascontiguousarray(tokens, dtype=np.int64).reshape(-1)))
            builder.end_document()
        grids.append(sample.codes.shape)
        condition_ids.append(sample.condition_id)
    codes.finalize(str(folder / "codes.idx"))
    captions.finalize(str(folder / "captions.idx"))
    grid_array = np.array(grids, dtype=np.int32).reshape(-1, 2)
    np.save(folder / "grids.npy", grid_array)
    if condition_ids and all(condition is not None for condition in condition_ids):
        np.save(folder / "condition_ids.npy", np.array(condition_ids, dtype=np.int64))
    return grid_array


def _write_manifest(folder: Path, grids: np.ndarray, vocabulary: Emu3Vocabulary, encode_text) -> None:
    words = {grid_text(*grid): encode_text(grid_text(*grid)) for grid in np.unique(grids, axis=0).tolist()}
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(folder.iterdir())}
    manifest = {
        "format_version": FORMAT_VERSION,
        "num_samples": len(grids),
        "vocabulary": vocabulary.fingerprint(),
        "grid_words": words,
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class TokenShards:
    """Random access to a shard folder, memory-mapped.

    Raises:
        UserError: a missing folder or file, a truncated file, another vocabulary, no samples; names the file.
    """

    def __init__(self, folder: str | Path, vocabulary: Emu3Vocabulary) -> None:
        self.folder = Path(folder)
        self.vocabulary = vocabulary
        self.manifest = self._checked_manifest()
        self._codes = IndexedDataset(str(self.folder / "codes"))
        self._captions = IndexedDataset(str(self.folder / "captions"))
        self.grids = np.load(self.folder / "grids.npy", allow_pickle=False)
        self.caption_lengths = self._captions.sequence_lengths
        named = self.folder / "condition_ids.npy"
        self._condition_ids = np.load(named, allow_pickle=False) if named.name in self.manifest["files"] else None
        self._check_lengths()

    def __len__(self) -> int:
        return self.manifest["num_samples"]

    def codes(self, sample: int) -> np.ndarray:
        """Codebook indices, uint16 ``[H, W]``."""
        return self._codes[int(sample)].reshape(self.grids[sample])

    def caption(self, sample: int) -> np.ndarray:
        """Caption tokens, int32 ``[T]``."""
        return self._captions[int(sample)]

    def grid_words(self, sample: int) -> list[int]:
        """The tokens of "H*W"."""
        return self.manifest["grid_words"][grid_text(*self.grids[sample].tolist())]

    def condition_ids(self, samples: np.ndarray) -> np.ndarray:
        """int64 ``[B]``, equal where conditions are the same: the data's own ids, else a hash of the caption."""
        if self._condition_ids is not None:
            return self._condition_ids[samples]
        digests = (hashlib.blake2b(self.caption(sample).tobytes(), digest_size=8).digest() for sample in samples)
        return np.array([int.from_bytes(digest, "little", signed=True) for digest in digests], dtype=np.int64)

    def fingerprint(self) -> str:
        """A short hash of the manifest, which holds the hash of every file."""
        return hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode()).hexdigest()[:16]

    def _checked_manifest(self) -> dict:
        path = self.folder / MANIFEST
        if not path.is_file():
            raise UserError(f"data.path: {path} is missing; give a folder of token shards, or the word digits")
        try:
            manifest = json.loads(path.read_text())
            version, expected = manifest["format_version"], manifest["files"]
            fingerprint, num_samples = manifest["vocabulary"], manifest["num_samples"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"data.path: {path} is not a shard manifest ({error}); tokenize the data again") from None
        if version != FORMAT_VERSION:
            raise UserError(f"data.path: {path} has format_version {version}; this program reads {FORMAT_VERSION}")
        if fingerprint != self.vocabulary.fingerprint():
            raise UserError(
                f"data.path: {self.folder} was tokenized for another vocabulary ({fingerprint}) than the model's "
                f"({self.vocabulary.fingerprint()}); tokenize it again for this model"
            )
        if num_samples < 1:
            raise UserError(f"data.path: {self.folder} holds no samples")
        self._check_sizes(expected)
        return manifest

    def _check_sizes(self, files: dict) -> None:
        for name, recorded in files.items():
            path = self.folder / name
            if not path.is_file():
                raise UserError(f"data.path: {path} is missing; tokenize the data again")
            if path.stat().st_size != recorded["bytes"]:
                raise UserError(
                    f"data.path: {path} has {path.stat().st_size} bytes instead of {recorded['bytes']}: it is "
                    "truncated or was changed; tokenize the data again"
                )

    def _check_lengths(self) -> None:
        for name, count in (
            ("codes.idx", len(self._codes)),
            ("captions.idx", len(self._captions)),
            ("grids.npy", len(self.grids)),
        ):
            if count != len(self):
                raise UserError(f"data.path: {self.folder / name} has {count} samples, the manifest {len(self)}")
