"""Model families. A family is one folder and one line in :data:`FAMILIES`; only what is asked for is imported."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from megatron_cca.config import Config, ModelConfig
from megatron_cca.errors import UserError
from megatron_cca.models.architecture import Architecture, with_explicit_sizes, with_overrides

if TYPE_CHECKING:
    from megatron_cca.models.formats import HuggingFaceFormat, ImageTokenizerFiles, WeightsFileFormat


@dataclass(frozen=True)
class Family:
    """Named sizes, and what checkpoints and image tokenizers look like; each is imported when it is first asked for.

    Args:
        presets_at: ``MODULE:NAME`` below this package of the sizes. Their names begin with the family's and a hyphen;
            the smallest is called FAMILY-tiny.
        huggingface_at, image_tokenizer_at, weights_file_at: ``MODULE:CLASS`` likewise; None where there is none.
    """

    presets_at: str
    huggingface_at: str | None = None
    image_tokenizer_at: str | None = None
    weights_file_at: str | None = None

    @cached_property
    def presets(self) -> dict[str, Architecture]:
        """The sizes by name."""
        return resolve_name(f"{__name__}.{self.presets_at}")

    @cached_property
    def huggingface(self) -> HuggingFaceFormat | None:
        """Its checkpoints on Hugging Face."""
        return _made(self.huggingface_at)

    @cached_property
    def image_tokenizer(self) -> ImageTokenizerFiles | None:
        """The files of its image tokenizer."""
        return _made(self.image_tokenizer_at)

    @cached_property
    def weights_file(self) -> WeightsFileFormat | None:
        """Its authors' own files of weights."""
        return _made(self.weights_file_at)


def _made(place: str | None) -> Any:
    return None if place is None else resolve_name(f"{__name__}.{place}")()


FAMILIES: dict[str, Family] = {
    "emu3": Family("emu3:PRESETS", "emu3.weights:Emu3HuggingFace", "emu3.vq_files:Emu3VqFiles"),
    "emu3_5": Family("emu3_5:PRESETS", "emu3_5.weights:Emu35HuggingFace", "emu3_5.image_tokenizer:Emu35VqFiles"),
    "janus": Family("janus:PRESETS", "janus.weights:JanusHuggingFace", "janus.image_tokenizer:JanusVqFiles"),
    "llamagen": Family(
        "llamagen:PRESETS", None, "llamagen.image_tokenizer:LlamaGenVqFiles", "llamagen.weights:LlamaGenWeightsFile"
    ),
    "var": Family("var:PRESETS", None, "var.image_tokenizer:VarVqFiles", "var.weights:VarWeightsFile"),
}


def resolve_architecture(config: ModelConfig) -> Architecture:
    """Return the architecture of a ``model`` section: its preset, with the sizes that the section sets.

    Raises:
        UserError: the preset is not known.
    """
    family = FAMILIES.get(_family_name(config))
    if family is None or config.name not in family.presets:
        known = ", ".join(name for family in FAMILIES.values() for name in family.presets)
        raise UserError(f"model.name: unknown preset {config.name!r}; known: {known}")
    return with_overrides(family.presets[config.name], config)


def explicit(config: Config) -> Config:
    """Return the configuration with every size of the model's preset written out, as a checkpoint records it."""
    return replace(config, model=with_explicit_sizes(config.model, resolve_architecture(config.model)))


def family_of(config: ModelConfig) -> Family:
    """Return the family of a ``model`` section's preset. The preset must be known."""
    return FAMILIES[_family_name(config)]


def tiny_architecture(config: ModelConfig) -> Architecture:
    """Return the smallest model of a ``model`` section's family, for laptops and tests. The preset must be known."""
    return family_of(config).presets[f"{_family_name(config)}-tiny"]


def _family_name(config: ModelConfig) -> str:
    return config.name.partition("-")[0]
