"""What a checkpoint says about itself in its ``checkpoint.json``, and what tells its weights from another's."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_cca.checkpoint import layout
from megatron_cca.config import Config, ModelConfig, TrainingConfig
from megatron_cca.config.load import config_from_dict, config_to_dict
from megatron_cca.errors import UserError, said_of
from megatron_cca.models import explicit, resolve_architecture
from megatron_cca.version import code_version

# The key of checkpoint.json that says which folder or file an import read.
IMPORTED_FROM = "imported_from"
_THREADS = 8


def summarize(config: Config, data: str | None = None) -> dict:
    """Plain data: every size written out, the version of this package, the vocabulary and the data.

    Args:
        config: of the run, or of the model alone.
        data: fingerprint of the shards; None where the weights saw none here.
    """
    return {
        "config": config_to_dict(explicit(config)),
        "version": code_version(),
        "vocabulary": resolve_architecture(config.model).vocabulary.fingerprint(),
        "data": data,
    }


def config_of_weights(model: ModelConfig, precision: str) -> Config:
    """A configuration of weights alone; all its other keys have defaults, which say nothing about these weights."""
    return Config(model=model, training=TrainingConfig(precision=precision))


def saved_config(folder: Path, key: str) -> Config:
    """The configuration that a whole checkpoint names; of an imported one its model and precision alone.

    Earlier versions recorded the defaults of all keys in an import, ``data.path: digits`` among them.

    Args:
        folder: the checkpoint's own folder.
        key: where the user named it, for messages.

    Raises:
        UserError: not a whole checkpoint, or one whose configuration is damaged; names the file.
    """
    summary = layout.read_summary(folder, key)
    saved = summary.get("config")
    if not isinstance(saved, dict):
        raise UserError(f"{key}: {folder / layout.SUMMARY} is damaged: it has no config; choose another checkpoint")
    with said_of(f"{key}: {folder / layout.SUMMARY}"):
        config = explicit(config_from_dict(saved))
    return config_of_weights(config.model, config.training.precision) if _no_run_wrote(summary) else config


def _no_run_wrote(summary: dict[str, Any]) -> bool:
    """A run records the fingerprint of its data; an import, the folder that it came from."""
    return IMPORTED_FROM in summary and summary.get("data") is None


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
