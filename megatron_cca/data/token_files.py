"""The token files of a shard folder: what is in them, and whether they fit each other.

codes.bin codes.idx        visual codes, uint16, one sequence of V * T * H * W per sample (Megatron's indexed format)
captions.bin captions.idx  caption tokens, int32
samples.npy                one :data:`SAMPLE` per sample: grid, caption length, condition, checksums
variants.npy               V of each sample, int32. The file is missing where V is 1 for all.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xxhash

from megatron_cca.errors import UserError, error_context
from megatron_cca.io.numpy_files import mapped_array
from megatron_cca.megatron_compat.indexed_dataset import index_header

TABLE, VARIANTS = "samples.npy", "variants.npy"
INDEXED = {"codes": np.uint16, "captions": np.int32}
_AGAIN = "tokenize the data again"
TOKEN_FILES = (*(f"{name}{suffix}" for name in INDEXED for suffix in (".bin", ".idx")), TABLE)

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


def checksum(tokens: np.ndarray) -> int:
    """Return the xxh3 hash (64 bits) of an array's bytes."""
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(tokens).data)


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
    with error_context(path):
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
    with error_context(path):
        variants = mapped_array(path)
    if variants.dtype != np.int32 or variants.shape != (num_samples,) or (variants < 1).any():
        raise UserError(f"{path} does not say how many variants each of {num_samples} samples has; {_AGAIN}")
    return np.array(variants)


def code_lengths(table: np.ndarray, variants: np.ndarray) -> np.ndarray:
    """Return the number of codes of each sample, all its variants together, int64 ``[N]``."""
    return table["grid"].prod(axis=1, dtype=np.int64) * variants


def _check_index(folder: Path, name: str, lengths: np.ndarray) -> None:
    path, count, width = folder / f"{name}.idx", len(lengths), np.dtype(INDEXED[name]).itemsize
    header = index_header(INDEXED[name], count)
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths * width)])
    parts = (lengths.astype(np.int32), ends[:-1], np.arange(count + 1))
    with path.open("rb") as file:
        fits = file.read(len(header)) == header
        fits = fits and all(np.array_equal(np.fromfile(file, part.dtype, len(part)), part) for part in parts)
        fits = fits and not file.read(1)
    if not fits or (lengths < 0).any() or (folder / f"{name}.bin").stat().st_size != ends[-1]:
        raise UserError(f"{path} does not fit {TABLE} or {name}.bin; {_AGAIN}")
