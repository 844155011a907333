"""Short hashes of a checkpoint's weights, for what is made with them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_cca.checkpoint import layout
from megatron_cca.io.external_files import sha256

_THREADS = 8


def weights_fingerprint(folder: Path, key: str) -> str:
    """Return a short hash of the files that hold a checkpoint's tensors. Reads every byte.

    The hash differs if the same weights are saved from another layout, or with an optimizer's state.

    Args:
        folder: the checkpoint's own folder.
        key: the key or option that named the checkpoint, for messages.

    Raises:
        UserError: the checkpoint is not whole.
    """
    names = sorted(name for name in layout.read_summary(folder, key)["files"] if name.endswith(".distcp"))
    return files_fingerprint(folder / name for name in names)


def files_fingerprint(paths: Iterable[Path]) -> str:
    """Return a short hash of the contents of files, in their order. Reads every byte."""
    with ThreadPoolExecutor(_THREADS) as threads:
        digests = list(threads.map(sha256, paths))
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:16]
