"""manifest.json of a shard folder: the meaning of the tokens, and the size and sha256 of every other file."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cca.data.token_files import TOKEN_FILES
from megatron_cca.errors import UserError, shortened
from megatron_cca.io.external_files import is_file_name

FORMAT_VERSION = 2
FILE_NAME = "manifest.json"

Json = dict[str, Any]

# Too large to be hashed whenever a run starts. Their samples have checksums of their own.
_HASHED_ON_READING = {"codes.bin", "captions.bin"}
_REQUIRED = {"num_samples": int, "vocabulary": str, "meta_words": dict, "files": dict}
_AGAIN = "tokenize the data again"


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


def _check_contents(manifest: Json) -> None:
    for key, kind in _REQUIRED.items():
        if not isinstance(manifest[key], kind):
            raise ValueError(f"{key} must be a {kind.__name__}, found {manifest[key]!r}"[:200])
    if isinstance(manifest["num_samples"], bool) or not 0 <= manifest["num_samples"] < 2**62:
        raise ValueError(f"num_samples must be a number of samples, found {manifest['num_samples']}")
    for key, ids in manifest["meta_words"].items():
        if not re.fullmatch(r"\d{1,9}x\d{1,9}x\d{1,9}", key, re.ASCII):
            raise ValueError(f"meta_words: {key!r} is not a grid such as '1x90x90'")
        if not isinstance(ids, list) or not all(type(token) is int and 0 <= token < 2**31 for token in ids):
            raise ValueError(f"meta_words: {key}: must be a list of token ids")
    for name, recorded in manifest["files"].items():
        if not is_file_name(name):
            raise ValueError(f"files: {shortened(repr(name), 80)} is not the name of a file in this folder")
        if not isinstance(recorded["bytes"], int) or not isinstance(recorded["sha256"], str):
            raise ValueError(f"files: {name} needs a number of bytes and a sha256")
    missing = [name for name in TOKEN_FILES if name not in manifest["files"]]
    if missing:
        raise ValueError(f"files: {missing[0]} is not listed")


def _reason(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)


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


def sha256(path: Path) -> str:
    """Return the sha256 of a file's contents, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def grid_key(grid: Iterable[int]) -> str:
    """Return the key of a grid in ``meta_words``, such as "1x90x90"."""
    return "x".join(map(str, grid))


def meta_ids(manifest: Json) -> dict[tuple[int, ...], np.ndarray]:
    """Return the token ids between BOI and IMG, int32 ``[G]``, by grid ``(T, H, W)``."""
    return {
        tuple(map(int, key.split("x"))): np.array(ids, dtype=np.int32) for key, ids in manifest["meta_words"].items()
    }
