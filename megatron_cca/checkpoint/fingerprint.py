"""What tells one checkpoint's weights from another's."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_cca.checkpoint import layout

_THREADS = 8


def weights_fingerprint(folder: Path, key: str) -> str:
    """A short hash of everything a checkpoint's tensors are stored in; reads every byte.

    The same weights saved from another layout, or together with an optimizer's state, have another.

    Args:
        folder: the checkpoint's own folder.
        key: where the user named it, for messages.

    Raises:
        UserError: not a whole checkpoint.
    """
    names = sorted(name for name in layout.read_summary(folder, key)["files"] if name.endswith(".distcp"))
    with ThreadPoolExecutor(_THREADS) as threads:
        digests = list(threads.map(lambda name: _sha256(folder / name), names))
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:16]


def recorded_fingerprint(folder: Path, key: str) -> str:
    """A short hash of what a checkpoint's summary records of its tensors' files; reads none of them.

    Of another kind than :func:`weights_fingerprint`; likewise the same weights saved anew have another.

    Raises:
        UserError: not a whole checkpoint.
    """
    files = layout.read_summary(folder, key)["files"]
    recorded = sorted((name, record["xxh3"]) for name, record in files.items() if name.endswith(".distcp"))
    return hashlib.sha256(repr(recorded).encode()).hexdigest()[:16]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
