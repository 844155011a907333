"""Model families. A family is one folder and one line in :data:`FAMILIES`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from megatron_cca.config import Config, ModelConfig
from megatron_cca.errors import UserError
from megatron_cca.models.architecture import Architecture, with_explicit_sizes, with_overrides
from megatron_cca.models.emu3.huggingface import Emu3HuggingFace
from megatron_cca.models.emu3.presets import PRESETS as EMU3_PRESETS
from megatron_cca.models.emu3.vq_files import Emu3VqFiles
from megatron_cca.models.huggingface_format import HuggingFaceFormat
from megatron_cca.models.image_tokenizer_files import ImageTokenizerFiles
from megatron_cca.models.llamagen.presets import PRESETS as LLAMAGEN_PRESETS
from megatron_cca.models.llamagen.vq_files import LlamaGenVqFiles
from megatron_cca.models.llamagen.weights import LlamaGenWeightsFile
from megatron_cca.models.weights_file_format import WeightsFileFormat


@dataclass(frozen=True)
class Family:
    """Named sizes, the smallest of which is called FAMILY-tiny; what checkpoints and image tokenizers look like."""

    presets: dict[str, Architecture]
    huggingface: HuggingFaceFormat | None = None
    image_tokenizer: ImageTokenizerFiles | None = None
    weights_file: WeightsFileFormat | None = None


FAMILIES: dict[str, Family] = {
    "emu3": Family(EMU3_PRESETS, Emu3HuggingFace(), Emu3VqFiles()),
    "llamagen": Family(LLAMAGEN_PRESETS, None, LlamaGenVqFiles(), LlamaGenWeightsFile()),
}


def resolve_architecture(config: ModelConfig) -> Architecture:
    """The architecture that a ``model`` section describes: its preset with the given sizes put in.

    Raises:
        UserError: an unknown preset.
    """
    presets = {name: preset for family in FAMILIES.values() for name, preset in family.presets.items()}
    if config.name not in presets:
        raise UserError(f"model.name: unknown preset {config.name!r}; known: {', '.join(presets)}")
    return with_overrides(presets[config.name], config)


def explicit(config: Config) -> Config:
    """The configuration with the model's preset resolved into sizes: what a checkpoint records."""
    return replace(config, model=with_explicit_sizes(config.model, resolve_architecture(config.model)))


def sizes_beside_preset(config: ModelConfig) -> dict[str, Any]:
    """The keys that a configuration needs for such a model: its preset's name, and every size that is not the preset's.

    Args:
        config: a ``model`` section with every size.

    Returns:
        Empty where the preset alone would do.
    """
    preset = with_explicit_sizes(ModelConfig(name=config.name), resolve_architecture(ModelConfig(name=config.name)))
    own = {key: value for key, value in vars(config).items() if value != getattr(preset, key)}
    # It follows from the two sizes of a vocabulary of classes.
    own = {key: value for key, value in own.items() if key != "vocab_size" or config.num_classes is None}
    return {"name": config.name, **own} if own else {}


def family_of(config: ModelConfig) -> Family:
    """The family that a ``model`` section's preset belongs to; the preset must be known."""
    return next(family for family in FAMILIES.values() if config.name in family.presets)


def tiny_architecture(config: ModelConfig) -> Architecture:
    """The smallest model of a ``model`` section's family, for laptops and tests; the preset must be known."""
    name = next(name for name, family in FAMILIES.items() if config.name in family.presets)
    return FAMILIES[name].presets[f"{name}-tiny"]
