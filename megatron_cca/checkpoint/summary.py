"""What a checkpoint says about itself, in its ``checkpoint.json``."""

from __future__ import annotations

from pathlib import Path

from megatron_cca.checkpoint import layout
from megatron_cca.config import Config
from megatron_cca.config_files import config_from_dict, config_to_dict
from megatron_cca.errors import UserError, said_of
from megatron_cca.models import explicit, resolve_architecture
from megatron_cca.version import code_version


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


def saved_config(folder: Path, key: str) -> Config:
    """The configuration that a whole checkpoint names.

    Args:
        folder: the checkpoint's own folder.
        key: where the user named it, for messages.

    Raises:
        UserError: not a whole checkpoint, or one whose configuration is damaged; names the file.
    """
    saved = layout.read_summary(folder, key).get("config")
    if not isinstance(saved, dict):
        raise UserError(f"{key}: {folder / layout.SUMMARY} is damaged: it has no config; choose another checkpoint")
    with said_of(f"{key}: {folder / layout.SUMMARY}"):
        return explicit(config_from_dict(saved))
