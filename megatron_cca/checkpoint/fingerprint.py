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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
