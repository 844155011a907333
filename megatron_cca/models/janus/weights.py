"""Janus-Pro on Hugging Face, in both of its forms, and its tensors under Megatron's names and under theirs.

original      deepseek-ai's repositories: ``MultiModalityCausalLM``, a class of deepseek-ai/Janus.
transformers  ``JanusForConditionalGeneration``.

The weight map has the authors' names for what draws images, and those of transformers' Llama for the decoder. The
words' head, the network that understands images and the image tokenizer are companion tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

from megatron_cca.config import ModelConfig
from megatron_cca.errors import UserError
from megatron_cca.models.architecture import Architecture
from megatron_cca.models.formats import Json, Shapes
from megatron_cca.models.janus import PRESETS
from megatron_cca.models.llama_files import (
    LLAMA_LAYERS,
    check_section,
    read_sizes,
    rotary_base,
    write_dtype,
    write_sizes,
)
from megatron_cca.models.naming import Naming
from megatron_cca.models.weight_map import OneToOne, WeightMap

ORIGINAL, TRANSFORMERS = "original", "transformers"

JANUS_WEIGHTS = WeightMap(
    rules=[
        OneToOne("embedding.word_embeddings.weight", "model.embed_tokens.weight", ("words", "hidden")),
        OneToOne("embedding.image_embeddings", "gen_embed.weight", ("codes", "image_channels")),
        OneToOne("embedding.image_fc1_weight", "gen_aligner.layers.0.weight", ("hidden", "image_channels")),
        OneToOne("embedding.image_fc1_bias", "gen_aligner.layers.0.bias", ("hidden",)),
        OneToOne("embedding.image_fc2_weight", "gen_aligner.layers.2.weight", ("hidden", "hidden")),
        OneToOne("embedding.image_fc2_bias", "gen_aligner.layers.2.bias", ("hidden",)),
        *LLAMA_LAYERS,
        OneToOne("image_head.fc_weight", "gen_head.output_mlp_projector.weight", ("hidden", "hidden")),
        OneToOne("image_head.fc_bias", "gen_head.output_mlp_projector.bias", ("hidden",)),
        OneToOne("output_layer.weight", "gen_head.vision_head.weight", ("output", "hidden")),
        OneToOne("output_layer.bias", "gen_head.vision_head.bias", ("output",)),
    ]
)

# What a Llama's configuration leaves out, which the authors' does for Janus-Pro-7B.
_LLAMA = {
    "num_layers": 32,
    "hidden_size": 4096,
    "ffn_hidden_size": 11_008,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "layernorm_epsilon": 1e-6,
    "vocab_size": 32_000,
    "rotary_base": 10_000,
}
_RELEASED = PRESETS["janus-pro-7b"]
_CHANNELS = _RELEASED.image_embedding_channels

# What the sections about images must say: the value of each key, or the size that it is, and its default if it has one.
_IMAGE_KEYS: dict[str, Mapping[str, tuple[Any, ...]]] = {
    ORIGINAL: {
        "gen_vision_config.cls": ("VQ-16",),
        "gen_vision_config.params.image_token_size": ("codebook_size",),
        "gen_vision_config.params.n_embed": (_CHANNELS,),
        "gen_aligner_config.cls": ("MlpProjector",),
        "gen_aligner_config.params.projector_type": ("mlp_gelu",),
        "gen_aligner_config.params.depth": (2, 1),
        "gen_aligner_config.params.input_dim": (_CHANNELS,),
        "gen_aligner_config.params.n_embed": ("hidden_size",),
        "gen_head_config.cls": ("vision_head",),
        "gen_head_config.params.n_embed": ("hidden_size",),
        "gen_head_config.params.image_token_embed": ("hidden_size",),
        "gen_head_config.params.image_token_size": ("codebook_size",),
    },
    TRANSFORMERS: {
        "vq_config.num_embeddings": ("codebook_size", 16_384),
        "vq_config.embed_dim": (_CHANNELS, 8),
        "vq_config.projection_dim": ("hidden_size", 2048),
        "vq_config.image_token_embed_dim": ("hidden_size", 2048),
        "vq_config.num_hidden_layers": (2, 2),
        "vq_config.hidden_act": ("gelu", "gelu"),
    },
}
_TEXT_KEYS = {ORIGINAL: "language_config", TRANSFORMERS: "text_config"}
_CODES_KEYS = {ORIGINAL: "gen_vision_config.params.image_token_size", TRANSFORMERS: "vq_config.num_embeddings"}
_COMPANIONS = {
    ORIGINAL: ("language_model.lm_head.", "vision_model.", "aligner.", "gen_vision_model."),
    TRANSFORMERS: ("lm_head.", "model.vision_model.", "model.aligner.", "model.vqmodel."),
}
_HEAD = {form: f"{prefixes[0]}weight" for form, prefixes in _COMPANIONS.items()}
# A limit for the networks that are built of a configuration before they are compared with the tensors.
_MOST_TENSORS = 4000


class JanusHuggingFace:
    """See :class:`megatron_cca.models.formats.HuggingFaceFormat`.

    Companion tensors keep their names, since those of the two forms differ in more than a prefix.
    """

    weights = JANUS_WEIGHTS
    marker = "model.embed_tokens.weight"
    model_types = frozenset({"multi_modality", "janus"})
    namings = (
        Naming(
            ORIGINAL,
            {"language_model.model.": "model."} | {name: name for name in ("gen_embed.", "gen_aligner.", "gen_head.")},
            companions={prefix: prefix for prefix in _COMPANIONS[ORIGINAL]},
        ),
        Naming(
            TRANSFORMERS,
            {
                "model.language_model.": "model.",
                "model.generation_embeddings.": "gen_embed.",
                "model.generation_aligner.fc1.": "gen_aligner.layers.0.",
                "model.generation_aligner.hidden_layers.0.": "gen_aligner.layers.2.",
                "model.generation_head.proj_out.": "gen_head.output_mlp_projector.",
                "model.generation_head.vision_head.": "gen_head.vision_head.",
            },
            companions={prefix: prefix for prefix in _COMPANIONS[TRANSFORMERS]},
        ),
    )

    def knows(self, config: Json) -> bool:
        """See :class:`HuggingFaceFormat`."""
        return True

    def form(self, config: Json) -> str:
        """See :class:`HuggingFaceFormat`."""
        return TRANSFORMERS if config.get("model_type") == "janus" else ORIGINAL

    def read_model_config(self, config: Json) -> ModelConfig:
        """See :class:`HuggingFaceFormat`. What the decoder's section leaves out is as in transformers' Llama."""
        text = _section(config, _TEXT_KEYS[self.form(config)])
        check_section(text, "Janus-Pro")
        sizes = read_sizes(text, _LLAMA)
        words, codes = sizes.pop("vocab_size"), self._codes(config)
        self._check_images(config, {"hidden_size": sizes["hidden_size"], "codebook_size": codes})
        name = _preset(sizes, words, codes)
        is_resized = PRESETS[name].vocabulary.codebook_size != codes
        return ModelConfig(
            name=name,
            rotary_base=rotary_base(text, _LLAMA["rotary_base"]),
            vocab_size=words + codes,
            codebook_size=codes if is_resized else None,
            **sizes,
        )

    def write_config(self, template: Json | None, architecture: Architecture, dtype: str, form: str) -> Json:
        """See :class:`HuggingFaceFormat`. A template in this form is needed, for the companion tensors."""
        if template is None or self.form(template) != form:
            raise UserError(
                "the words' head, the network that understands images and the image tokenizer are missing; give a "
                "template in that form"
            )
        self._check_same_size(template, architecture)
        config = copy.deepcopy(template)
        text = config.setdefault(_TEXT_KEYS[form], {})
        write_sizes(text, architecture, _LLAMA)
        write_dtype(config, text, dtype)
        return config

    def companion_shapes(self, config: Json, found: Shapes) -> Shapes:
        """See :class:`HuggingFaceFormat`. In the authors' form only the shape of the words' head is known here.

        The words' head may be missing if the configuration says that it is the table of words.
        """
        form = self.form(config)
        head, text = _HEAD[form], _section(config, _TEXT_KEYS[form])
        if form == TRANSFORMERS:
            from megatron_cca.models.janus.in_transformers import companion_shapes

            wanted = companion_shapes(config, text, _MOST_TENSORS)
            is_tied = config.get("tie_word_embeddings", True)
        else:
            sizes = read_sizes(text, _LLAMA)
            wanted = {**found, head: (sizes["vocab_size"], sizes["hidden_size"])}
            # Names for a message, where there is no tensor at all of a part.
            for prefix in _COMPANIONS[form]:
                if not any(name.startswith(prefix) for name in wanted):
                    wanted[f"{prefix}*"] = ()
            is_tied = text.get("tie_word_embeddings", False)
        return {name: shape for name, shape in wanted.items() if name != head or name in found or not is_tied}

    def transformers_model(self, config: Json):
        """See :class:`HuggingFaceFormat`. It takes the ids of the vocabulary here: codes, then words."""
        from megatron_cca.models.janus.in_transformers import code_decoder

        return code_decoder(_section(config, _TEXT_KEYS[self.form(config)]), self._codes(config), _CHANNELS)

    def _codes(self, config: Json) -> int:
        key = _CODES_KEYS[self.form(config)]
        found = _at(config, key, _IMAGE_KEYS[self.form(config)][key][1:])
        if isinstance(found, bool) or not isinstance(found, int) or found <= 0:
            raise UserError(f"{key}: must be a positive integer, found {found!r}")
        return found

    def _check_images(self, config: Json, sizes: Mapping[str, int]) -> None:
        for key, (value, *default) in _IMAGE_KEYS[self.form(config)].items():
            wanted, found = sizes.get(value, value), _at(config, key, default)
            if found != wanted:
                raise UserError(f"{key}: {found!r} is not what Janus-Pro has, {wanted!r}")

    def _check_same_size(self, template: Json, architecture: Architecture) -> None:
        """Refuse a template whose companion tensors fit another model."""
        text = _section(template, _TEXT_KEYS[self.form(template)])
        sizes = read_sizes(text, _LLAMA)
        for what, found, wanted in (
            ("channels", sizes["hidden_size"], architecture.hidden_size),
            ("words", sizes["vocab_size"], architecture.num_words),
            ("codes", self._codes(template), architecture.vocabulary.output_size),
        ):
            if found != wanted:
                raise UserError(f"the template has {found} {what}, the checkpoint {wanted}; give one of the same size")


def _section(config: Json, key: str) -> Json:
    section = config.get(key) or {}
    if not isinstance(section, dict):
        raise UserError(f"{key}: must be an object, found {repr(section)[:60]}")
    return section


def _at(config: Json, key: str, default: Collection[Any]) -> Any:
    """Return the value at a dotted key, or the default if there is one."""
    found: Any = config
    for part in key.split("."):
        if not isinstance(found, dict) or part not in found:
            if default:
                return next(iter(default))
            raise UserError(f"{key}: is missing; this is no Janus-Pro")
        found = found[part]
    return found


def _preset(sizes: Mapping[str, float], words: int, codes: int) -> str:
    """Return the preset of these sizes, or one with as many words.

    Raises:
        UserError: there is none with as many words, or the words are the released ones and the codes are others.
    """
    released = _RELEASED.vocabulary
    fitting = {name: preset for name, preset in PRESETS.items() if preset.vocabulary.caption_size == words}
    if not fitting:
        raise UserError(f"vocab_size: {words} words, Janus-Pro has {released.caption_size}")
    if words == released.caption_size and codes != released.codebook_size:
        raise UserError(f"{codes} codes, Janus-Pro has {released.codebook_size}")
    same = [
        name
        for name, preset in fitting.items()
        if (preset.num_layers, preset.hidden_size) == (sizes["num_layers"], sizes["hidden_size"])
    ]
    return [*same, *fitting][0]
