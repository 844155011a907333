"""Token shards, pairing and batches: a global batch is a pure function of (data, seed, step)."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_cca.errors import UserError

if TYPE_CHECKING:
    from megatron_cca.config import Config

# What data.path and others mean by this word: scikit-learn's scans, see :mod:`megatron_cca.data.digits`.
DIGITS = "digits"


def is_tiny(model: str) -> bool:
    """Return whether a name is that of a preset which takes its sizes from its data."""
    return model.endswith("-tiny")


def with_sizes_of_data(config: Config) -> Config:
    """Return a run's configuration. A tiny preset takes the sizes that it leaves out from the run's shards."""
    path, folders = config.data.path, []
    if is_tiny(config.model.name):
        folders = [Path(name) for name in ([path] if isinstance(path, str) else path or ()) if name != DIGITS]
    if not any(_has_sizes(folder) for folder in folders):
        return config
    from megatron_cca.data.tiny_sizes import with_sizes_of

    return with_sizes_of(config, folders)


def _has_sizes(folder: Path) -> bool:
    from megatron_cca.data.manifest import read_manifest

    # What cannot be read is refused later.
    with suppress(UserError):
        return "model" in read_manifest(folder)
    return False
