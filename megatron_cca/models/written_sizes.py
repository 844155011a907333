"""What a configuration must say about a model beside its preset's name."""

from __future__ import annotations

from typing import Any

from megatron_cca.config import ModelConfig
from megatron_cca.models import resolve_architecture
from megatron_cca.models.architecture import with_explicit_sizes


def sizes_beside_preset(config: ModelConfig) -> dict[str, Any]:
    """Return the keys that a configuration needs for a model: the preset's name, and sizes that differ from the preset.

    Args:
        config: a ``model`` section with every size.

    Returns:
        Values by key. Empty if the preset alone is enough.
    """
    preset = with_explicit_sizes(ModelConfig(name=config.name), resolve_architecture(ModelConfig(name=config.name)))
    own = {key: value for key, value in vars(config).items() if value != getattr(preset, key)}
    # For classes, vocab_size follows from codebook_size and num_classes.
    own = {key: value for key, value in own.items() if key != "vocab_size" or config.num_classes is None}
    return {"name": config.name, **own} if own else {}
