"""The files of a shard folder: ``manifest.json`` with the meaning of the tokens and every checksum, and the tokens.

codes.bin codes.idx        visual codes, one sequence of V * T * H * W per sample (Megatron's indexed format), uint16,
                           or int32 for a codebook of more than 65,536
captions.bin captions.idx  caption tokens, int32
samples.npy                one :data:`SAMPLE` per sample: grid, caption length, condition, checksums
variants.npy               V of each sample, int32. The file is missing where V is 1 for all.
pairs.npy                  pairs of samples, the better one first, int64. Only where preferences were read.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megatron_cca.errors import UserError, error_context, shortened
from megatron_cca.io.external_files import is_file_name, mapped_array, sha256

TABLE, VARIANTS = "samples.npy", "variants.npy"
INDEXED = ("codes", "captions")
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
FORMAT_VERSION = 2
# The entry with the ids that stand in place of any caption that is dropped. Most families have none.
UNCONDITIONAL = "unconditional"
FILE_NAME = "manifest.json"
Json = dict[str, Any]
# Too large to be hashed whenever a run starts. Their samples have checksums of their own.
_HASHED_ON_READING = {"codes.bin", "captions.bin"}
_REQUIRED = {"num_samples": int, "vocabulary": str, "meta_words": dict, "files": dict}


def token_types(codebook_size: int) -> dict[str, type[np.integer]]:
    """Return the dtype in each of the token files."""
    return {"codes": np.uint16 if codebook_size <= 2**16 else np.int32, "captions": np.int32}


def checksum(tokens: np.ndarray) -> int:
    """Return the xxh3 hash (64 bits) of an array's bytes."""
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(tokens).data)


def open_table(
    folder: Path, num_samples: int, codebook_size: int, *, has_variants: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Return the table of a folder's samples and their variants. Check that the other token files fit it.

    Megatron's reader trusts the index. Its right contents follow from the table.

    Args:
        folder: of token files.
        num_samples: N, how many there should be.
        codebook_size: of the codes.
        has_variants: whether there is a file of variants.

    Returns:
        :data:`SAMPLE` ``[N]``, memory-mapped, and int32 ``[N]``, how many variants each has.

    Raises:
        UserError: a file that is damaged or does not fit; names the file.
    """
    path, table = folder / TABLE, read_table(folder, num_samples)
    # Floats do not wrap around.
    largest = (folder / "codes.bin").stat().st_size
    variants = _read_variants(folder / VARIANTS, num_samples) if has_variants else np.ones(num_samples, np.int32)
    if (table["grid"] < 1).any() or (table["grid"].prod(axis=1, dtype=np.float64) * variants > largest).any():
        raise UserError(f"{path} has grids that codes.bin cannot hold; {_AGAIN}")
    for name, lengths in (("codes", code_lengths(table, variants)), ("captions", table["caption_length"])):
        _check_index(folder, name, token_types(codebook_size)[name], lengths.astype(np.int64))
    return table, variants


def read_table(folder: Path, num_samples: int) -> np.ndarray:
    """Return the table of a folder's samples, :data:`SAMPLE` ``[N]``, memory-mapped. The other files are not read.

    Raises:
        UserError: a file that is damaged or holds another number of samples; names it.
    """
    path = folder / TABLE
    with error_context(path):
        table = mapped_array(path)
    if table.dtype != SAMPLE or table.shape != (num_samples,):
        raise UserError(f"{path} does not hold {num_samples} samples, as the manifest says")
    return table


def code_lengths(table: np.ndarray, variants: np.ndarray) -> np.ndarray:
    """Return the number of codes of each sample, all its variants together, int64 ``[N]``."""
    return table["grid"].prod(axis=1, dtype=np.int64) * variants


def read_manifest(folder: Path) -> Json:
    """Read the manifest of a shard folder.

    Raises:
        UserError: a missing or damaged manifest, or one of another format version; names the file.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        raise UserError(f"{path} is missing; give a folder of token shards")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format_version"]
        if version == FORMAT_VERSION:
            _check_contents(manifest)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is not a shard manifest ({_reason(error)}); {_AGAIN}") from None
    if version != FORMAT_VERSION:
        raise UserError(f"{path} has format_version {version}; this program reads {FORMAT_VERSION}; {_AGAIN}")
    return manifest


def check_files(folder: Path, manifest: Json, *, thoroughly: bool = False) -> None:
    """Compare the files with the manifest: all sizes, and the sha256 of all but the two large files.

    Args:
        folder, manifest: as from :func:`read_manifest`.
        thoroughly: whether to hash the large files, too.

    Raises:
        UserError: a missing, truncated or changed file; names the file.
    """
    for name, recorded in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing; {_AGAIN}")
        size = path.stat().st_size
        if size != recorded["bytes"]:
            raise UserError(
                f"{path} has {size} bytes instead of {recorded['bytes']}: it is truncated or was changed; {_AGAIN}"
            )
        if (thoroughly or name not in _HASHED_ON_READING) and sha256(path) != recorded["sha256"]:
            raise UserError(f"{path} is not what it was when it was written (its sha256 differs); {_AGAIN}")


def fingerprint(contents: Json) -> str:
    """Return a short hash of a manifest, which holds the hash of every file."""
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()[:16]


def grid_key(grid: Iterable[int]) -> str:
    """Return the key of a grid in ``meta_words``, such as "1x90x90"."""
    return "x".join(map(str, grid))


def unconditional_ids(manifest: Json) -> np.ndarray:
    """Return the ids of the words that stand in place of dropped captions, int32 ``[U]``. Mostly there are none."""
    return np.array(manifest.get(UNCONDITIONAL, []), dtype=np.int32)


def meta_ids(manifest: Json) -> dict[tuple[int, ...], np.ndarray]:
    """Return the token ids between BOI and IMG, int32 ``[G]``, by grid ``(T, H, W)``."""
    return {
        tuple(map(int, key.split("x"))): np.array(ids, dtype=np.int32) for key, ids in manifest["meta_words"].items()
    }


def _read_variants(path: Path, num_samples: int) -> np.ndarray:
    with error_context(path):
        variants = mapped_array(path)
    if variants.dtype != np.int32 or variants.shape != (num_samples,) or (variants < 1).any():
        raise UserError(f"{path} does not say how many variants each of {num_samples} samples has; {_AGAIN}")
    return np.array(variants)


def _check_index(folder: Path, name: str, dtype: type[np.integer], lengths: np.ndarray) -> None:
    # Imported late: a program reads manifests before it installs the platform, and Megatron-Core comes after that.
    from megatron_cca.megatron_compat.indexed_dataset import index_header

    path, count, width = folder / f"{name}.idx", len(lengths), np.dtype(dtype).itemsize
    header = index_header(dtype, count)
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths * width)])
    parts = (lengths.astype(np.int32), ends[:-1], np.arange(count + 1))
    with path.open("rb") as file:
        fits = file.read(len(header)) == header
        fits = fits and all(np.array_equal(np.fromfile(file, part.dtype, len(part)), part) for part in parts)
        fits = fits and not file.read(1)
    if not fits or (lengths < 0).any() or (folder / f"{name}.bin").stat().st_size != ends[-1]:
        raise UserError(f"{path} does not fit {TABLE} or {name}.bin; {_AGAIN}")


def _check_contents(manifest: Json) -> None:
    for key, kind in _REQUIRED.items():
        if not isinstance(manifest[key], kind):
            raise ValueError(f"{key} must be a {kind.__name__}, found {manifest[key]!r}"[:200])
    if isinstance(manifest["num_samples"], bool) or not 0 <= manifest["num_samples"] < 2**62:
        raise ValueError(f"num_samples must be a number of samples, found {manifest['num_samples']}")
    for key, ids in manifest["meta_words"].items():
        if not re.fullmatch(r"\d{1,9}x\d{1,9}x\d{1,9}", key, re.ASCII):
            raise ValueError(f"meta_words: {key!r} is not a grid such as '1x90x90'")
        if not _are_ids(ids):
            raise ValueError(f"meta_words: {key}: must be a list of token ids")
    if not _are_ids(manifest.get(UNCONDITIONAL, [])):
        raise ValueError(f"{UNCONDITIONAL}: must be a list of token ids")
    for name, recorded in manifest["files"].items():
        if not is_file_name(name):
            raise ValueError(f"files: {shortened(repr(name), 80)} is not the name of a file in this folder")
        if not isinstance(recorded["bytes"], int) or not isinstance(recorded["sha256"], str):
            raise ValueError(f"files: {name} needs a number of bytes and a sha256")
    missing = [name for name in TOKEN_FILES if name not in manifest["files"]]
    if missing:
        raise ValueError(f"files: {missing[0]} is not listed")


def _are_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(token) is int and 0 <= token < 2**31 for token in value)


def _reason(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)
