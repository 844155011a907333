"""The summary of a checkpoint, kept in its ``checkpoint.json``, and fingerprints of its weights."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_cca.checkpoint import layout
from megatron_cca.config import Config, ModelConfig, TrainingConfig
from megatron_cca.config.former import of_today
from megatron_cca.config.load import config_from_dict, config_to_dict
from megatron_cca.errors import UserError, error_context
from megatron_cca.models import explicit, resolve_architecture
from megatron_cca.version import code_version

# Key of checkpoint.json: the folder or file that was imported.
IMPORTED_FROM = "imported_from"
_THREADS = 8


def summarize(config: Config, data: str | None = None) -> dict:
    """Return a summary as plain data: configuration with explicit sizes, package version, vocabulary and data.

    Args:
        config: configuration of the run, or of the model alone.
        data: fingerprint of the shards. None if this package did not train the weights.
    """
    return {
        "config": config_to_dict(explicit(config)),
        "version": code_version(),
        "vocabulary": resolve_architecture(config.model).vocabulary.fingerprint(),
        "data": data,
    }


def config_of_weights(model: ModelConfig, precision: str) -> Config:
    """Return a configuration for weights alone. Its other keys have defaults, which say nothing of these weights."""
    return Config(model=model, training=TrainingConfig(precision=precision))


def saved_config(folder: Path, key: str) -> Config:
    """Return the configuration of a whole checkpoint. For an imported one, only model and precision are taken.

    What an earlier version wrote is read with today's keys, see ``config/former.py``. In an import earlier versions
    recorded the defaults of all keys, ``data.path: digits`` among them.

    Args:
        folder: the checkpoint's own folder.
        key: the key or option that named the checkpoint, for messages.

    Raises:
        UserError: the checkpoint is not whole, or its configuration is damaged. Names the file.
    """
    summary = layout.read_summary(folder, key)
    saved = summary.get("config")
    if not isinstance(saved, dict):
        raise UserError(f"{key}: {folder / layout.SUMMARY} is damaged: it has no config; choose another checkpoint")
    with error_context(f"{key}: {folder / layout.SUMMARY}"):
        config = explicit(config_from_dict(of_today(saved)))
    return config_of_weights(config.model, config.training.precision) if _no_run_wrote(summary) else config


def _no_run_wrote(summary: dict[str, Any]) -> bool:
    """Return whether a checkpoint is an import. An import records its source, a run the fingerprint of its data."""
    return IMPORTED_FROM in summary and summary.get("data") is None


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
    with ThreadPoolExecutor(_THREADS) as threads:
        digests = list(threads.map(lambda name: _sha256(folder / name), names))
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:16]


def recorded_fingerprint(folder: Path, key: str) -> str:
    """Return a short hash of the recorded checksums of a checkpoint's tensor files. Reads none of these files.

    It never equals :func:`weights_fingerprint`. The hash can differ if the same weights are saved again.

    Raises:
        UserError: the checkpoint is not whole.
    """
    files = layout.read_summary(folder, key)["files"]
    recorded = sorted((name, record["xxh3"]) for name, record in files.items() if name.endswith(".distcp"))
    return hashlib.sha256(repr(recorded).encode()).hexdigest()[:16]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
