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
from megatron_cca.models.formats import HuggingFaceFormat, ImageTokenizerFiles, WeightsFileFormat
from megatron_cca.models.llamagen.presets import PRESETS as LLAMAGEN_PRESETS
from megatron_cca.models.llamagen.vq_files import LlamaGenVqFiles
from megatron_cca.models.llamagen.weights import LlamaGenWeightsFile


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        presets: named sizes. The name of the smallest one is FAMILY-tiny.
        huggingface: format of its checkpoints on Hugging Face. None if there are none.
        image_tokenizer: the files of its image tokenizer. None if it has none.
        weights_file: format of its authors' own weights files. None if there are none.
    """

    presets: dict[str, Architecture]
    huggingface: HuggingFaceFormat | None = None
    image_tokenizer: ImageTokenizerFiles | None = None
    weights_file: WeightsFileFormat | None = None


FAMILIES: dict[str, Family] = {
    "emu3": Family(EMU3_PRESETS, Emu3HuggingFace(), Emu3VqFiles()),
    "llamagen": Family(LLAMAGEN_PRESETS, None, LlamaGenVqFiles(), LlamaGenWeightsFile()),
}


def resolve_architecture(config: ModelConfig) -> Architecture:
    """Return the architecture of a ``model`` section: its preset, with the sizes that the section sets.

    Raises:
        UserError: the preset is not known.
    """
    presets = {name: preset for family in FAMILIES.values() for name, preset in family.presets.items()}
    if config.name not in presets:
        raise UserError(f"model.name: unknown preset {config.name!r}; known: {', '.join(presets)}")
    return with_overrides(presets[config.name], config)


def explicit(config: Config) -> Config:
    """Return the configuration with every size of the model's preset written out, as a checkpoint records it."""
    return replace(config, model=with_explicit_sizes(config.model, resolve_architecture(config.model)))


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


def family_of(config: ModelConfig) -> Family:
    """Return the family of a ``model`` section's preset. The preset must be known."""
    return next(family for family in FAMILIES.values() if config.name in family.presets)


def tiny_architecture(config: ModelConfig) -> Architecture:
    """Return the smallest model of a ``model`` section's family, for laptops and tests. The preset must be known."""
    name = next(name for name, family in FAMILIES.items() if config.name in family.presets)
    return FAMILIES[name].presets[f"{name}-tiny"]
