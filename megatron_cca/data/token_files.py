"""The token files of a shard folder, written one sample at a time and joined from parts.

codes.bin codes.idx        visual codes, uint16, one sequence of V * T * H * W per sample (Megatron's indexed format)
captions.bin captions.idx  caption tokens, int32
samples.npy                one :data:`SAMPLE` per sample: grid, caption length, condition, checksums
variants.npy               V of each sample, int32. The file is missing where V is 1 for all.
"""

from __future__ import annotations

import contextlib
import shutil
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
import xxhash
from megatron.core.datasets.indexed_dataset import _INDEX_HEADER, DType, IndexedDatasetBuilder

from megatron_cca.errors import UserError, said_of
from megatron_cca.io.numpy_files import mapped_array
from megatron_cca.models.image_vocabulary import ImageVocabulary

TABLE, VARIANTS = "samples.npy", "variants.npy"
_INDEXED = {"codes": np.uint16, "captions": np.int32}
_AGAIN = "tokenize the data again"
TOKEN_FILES = (*(f"{name}{suffix}" for name in _INDEXED for suffix in (".bin", ".idx")), TABLE)

# Frames, height and width of the code grid, the number of caption tokens, and three 64-bit hashes (xxh3): of the
# caption's tokens, of the condition's name (the caption's hash if it has none), of the codes.
SAMPLE = np.dtype(
    [
        ("grid", np.int32, 3),
        ("caption_length", np.int32),
        ("caption", np.uint64),
        ("condition", np.uint64),
        ("codes", np.uint64),
    ]
)


@dataclass(frozen=True)
class Sample:
    """One tokenised image or clip.

    Attributes:
        codes: int ``[H, W]``, ``[T, H, W]`` for T code frames, or ``[V, T, H, W]`` for V variants of one image, such as
            crops and its mirror image. A step sees one variant.
        caption: int ``[C]``.
        condition: samples with equal names have the same condition. None means that the caption is the condition.
    """

    codes: np.ndarray
    caption: np.ndarray
    condition: str | None = None


def checksum(tokens: np.ndarray) -> int:
    """Return the xxh3 hash (64 bits) of an array's bytes."""
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(tokens).data)


def _name_hash(name: str) -> int:
    return xxhash.xxh3_64_intdigest(name.encode("utf-8", "surrogatepass"))


class TokenWriter:
    """Writes the token files of samples in the order of :meth:`add`. A context manager, whose end completes the files.

    Args:
        folder: an existing folder without token files.
        vocabulary: what the tokens mean.
    """

    def __init__(self, folder: Path, vocabulary: ImageVocabulary) -> None:
        self._folder, self._vocabulary = folder, vocabulary
        self._rows: list[tuple] = []
        self._variants: list[int] = []
        self._builders = {
            name: IndexedDatasetBuilder(str(folder / f"{name}.bin"), dtype=dtype) for name, dtype in _INDEXED.items()
        }

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                self._finish()
        finally:
            for builder in self._builders.values():
                # The error that ended the block, such as a full disk, is the one to raise.
                with contextlib.suppress(OSError):
                    builder.data_file.close()

    def add(self, sample: Sample) -> None:
        """Write one sample.

        Raises:
            UserError: a code or caption token outside the vocabulary; names the sample.
        """
        _check_tokens(len(self._rows), sample, self._vocabulary)
        codes = sample.codes.astype(np.uint16).reshape(-1)
        caption = sample.caption.astype(np.int32)
        for name, tokens in (("codes", codes), ("captions", caption)):
            self._builders[name].add_item(torch.from_numpy(tokens))
            self._builders[name].end_document()
        variants, *grid = (1,) * (4 - sample.codes.ndim) + sample.codes.shape
        caption_hash = checksum(caption)
        condition = caption_hash if sample.condition is None else _name_hash(sample.condition)
        self._rows.append((grid, len(caption), caption_hash, condition, checksum(codes)))
        self._variants.append(variants)

    def _finish(self) -> None:
        for name, builder in self._builders.items():
            builder.finalize(str(self._folder / f"{name}.idx"))
        np.save(self._folder / TABLE, np.array(self._rows, dtype=SAMPLE))
        _save_variants(self._folder, np.array(self._variants, dtype=np.int32))


def _save_variants(folder: Path, variants: np.ndarray) -> None:
    if (variants != 1).any():
        np.save(folder / VARIANTS, variants)


def open_table(folder: Path, num_samples: int, *, has_variants: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Return the table of a folder's samples and their variants. Check that the other token files fit it.

    Megatron's reader trusts the index. Its right contents follow from the table.

    Args:
        folder: of token files.
        num_samples: N, how many there should be.
        has_variants: whether there is a file of variants.

    Returns:
        :data:`SAMPLE` ``[N]``, memory-mapped, and int32 ``[N]``, how many variants each has.

    Raises:
        UserError: a file that is damaged or does not fit; names the file.
    """
    path = folder / TABLE
    with said_of(path):
        table = mapped_array(path)
    if table.dtype != SAMPLE or table.shape != (num_samples,):
        raise UserError(f"{path} does not hold {num_samples} samples, as the manifest says")
    # Floats do not wrap around.
    largest = (folder / "codes.bin").stat().st_size
    variants = _read_variants(folder / VARIANTS, num_samples) if has_variants else np.ones(num_samples, np.int32)
    if (table["grid"] < 1).any() or (table["grid"].prod(axis=1, dtype=np.float64) * variants > largest).any():
        raise UserError(f"{path} has grids that codes.bin cannot hold; {_AGAIN}")
    for name, lengths in (("codes", code_lengths(table, variants)), ("captions", table["caption_length"])):
        _check_index(folder, name, lengths.astype(np.int64))
    return table, variants


def _read_variants(path: Path, num_samples: int) -> np.ndarray:
    with said_of(path):
        variants = mapped_array(path)
    if variants.dtype != np.int32 or variants.shape != (num_samples,) or (variants < 1).any():
        raise UserError(f"{path} does not say how many variants each of {num_samples} samples has; {_AGAIN}")
    return np.array(variants)


def code_lengths(table: np.ndarray, variants: np.ndarray) -> np.ndarray:
    """Return the number of codes of each sample, all its variants together, int64 ``[N]``."""
    return table["grid"].prod(axis=1, dtype=np.int64) * variants


def _check_index(folder: Path, name: str, lengths: np.ndarray) -> None:
    path, count, width = folder / f"{name}.idx", len(lengths), np.dtype(_INDEXED[name]).itemsize
    header = _INDEX_HEADER + struct.pack("<QBQQ", 1, DType.code_from_dtype(_INDEXED[name]), count, count + 1)
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths * width)])
    parts = (lengths.astype(np.int32), ends[:-1], np.arange(count + 1))
    with path.open("rb") as file:
        fits = file.read(len(header)) == header
        fits = fits and all(np.array_equal(np.fromfile(file, part.dtype, len(part)), part) for part in parts)
        fits = fits and not file.read(1)
    if not fits or (lengths < 0).any() or (folder / f"{name}.bin").stat().st_size != ends[-1]:
        raise UserError(f"{path} does not fit {TABLE} or {name}.bin; {_AGAIN}")


def join_token_files(folder: Path, parts: Sequence[Path]) -> None:
    """Write the token files of all parts, in their order, into ``folder``."""
    tables = [mapped_array(part / TABLE) for part in parts]
    variants = [
        mapped_array(part / VARIANTS) if (part / VARIANTS).is_file() else np.ones(len(table), np.int32)
        for part, table in zip(parts, tables, strict=True)
    ]
    for name, dtype in _INDEXED.items():
        builder = IndexedDatasetBuilder(str(folder / f"{name}.bin"), dtype=dtype)
        with contextlib.closing(builder.data_file):
            for part, table, counts in zip(parts, tables, variants, strict=True):
                lengths = code_lengths(table, counts) if name == "codes" else table["caption_length"]
                _append(builder, part / f"{name}.bin", lengths.tolist())
        builder.finalize(str(folder / f"{name}.idx"))
    np.save(folder / TABLE, np.concatenate([np.empty(0, SAMPLE), *tables]))
    _save_variants(folder, np.concatenate([np.empty(0, np.int32), *variants]))


def _append(builder: IndexedDatasetBuilder, path: Path, lengths: list[int]) -> None:
    # Megatron's add_index does the same, but collects garbage on every call. That takes hours for many parts.
    first = len(builder.sequence_lengths)
    builder.sequence_lengths.extend(lengths)
    builder.document_indices.extend(range(first + 1, first + len(lengths) + 1))
    with path.open("rb") as file:
        shutil.copyfileobj(file, builder.data_file)


def _check_tokens(index: int, sample: Sample, vocabulary: ImageVocabulary) -> None:
    captions = "text vocabulary" if vocabulary.num_classes is None else "number of classes"
    for what, tokens, size, of in (
        ("visual code", sample.codes, vocabulary.codebook_size, "codebook"),
        ("caption token", sample.caption, vocabulary.caption_size, captions),
    ):
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < size:
            wrong = tokens.max() if tokens.max() >= size else tokens.min()
            raise UserError(f"sample {index}: {what} {wrong} does not fit a {of} of {size}")
