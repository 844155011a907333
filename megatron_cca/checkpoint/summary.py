"""What a checkpoint says about itself, in its ``checkpoint.json``."""

from __future__ import annotations

from megatron_cca import __version__
from megatron_cca.config import Config, config_to_dict
from megatron_cca.models import explicit, resolve_architecture


def summarize(config: Config, data: str | None = None) -> dict:
    """Plain data: every size written out, the version of this package, the vocabulary and the data.

    Args:
        config: of the run, or of the model alone.
        data: fingerprint of the shards; None where the weights saw none here.
    """
    return {
        "config": config_to_dict(explicit(config)),
        "version": __version__,
        "vocabulary": resolve_architecture(config.model).vocabulary.fingerprint(),
        "data": data,
    }
