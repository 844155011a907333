"""Emu3 on Hugging Face, in both of its forms, and its tensors under Megatron's names and under transformers'.

original      baaivision/Emu3's repositories (and what transformers' ``Emu3ForCausalLM`` saves): one flat decoder.
transformers  ``Emu3ForConditionalGeneration``: the decoder as ``text_model`` and the image tokenizer as ``vqmodel`` in
              one folder, under these names or, saved with ``save_original_format=False``, under those in memory.
llama         the original's tensors under the configuration of a Llama. An export alone.
"""

from __future__ import annotations

import copy

from megatron_cca.config import ModelConfig
from megatron_cca.errors import UserError, error_context
from megatron_cca.models.architecture import Architecture
from megatron_cca.models.emu3 import PRESETS, Emu3Vocabulary
from megatron_cca.models.emu3.vq_files import recognise, sizes_in
from megatron_cca.models.formats import Json, Shapes, transformers_refusals
from megatron_cca.models.llama_files import (
    LLAMA_LAYERS,
    check_section,
    check_untied,
    read_sizes,
    rotary_base,
    settings_of,
    write_dtype,
    write_sizes,
)
from megatron_cca.models.naming import Naming
from megatron_cca.models.stock_llama import LLAMA, stock_config
from megatron_cca.models.weight_files import CONFIG
from megatron_cca.models.weight_map import OneToOne, WeightMap

EMU3_WEIGHTS = WeightMap(
    rules=[
        OneToOne("embedding.word_embeddings.weight", "model.embed_tokens.weight", ("vocab", "hidden")),
        *LLAMA_LAYERS,
        OneToOne("output_layer.weight", "lm_head.weight", ("vocab", "hidden")),
    ]
)


ORIGINAL, TRANSFORMERS = "original", "transformers"

_FLAT = {name: name for name in ("model.embed_tokens.", "model.layers.", "model.norm.", "lm_head.")}

# Emu3 and Emu3.5 have one model_type in their authors' form.
ORIGINAL_TYPE = "Emu3"
_VOCABULARY_OF_EMU3_5 = 282_926

_RELEASED = PRESETS["emu3-8b"]

# A limit for the network that is built of a configuration before it is compared with the tensors.
_MOST_TENSORS = 2000

_SIZES = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups"),
    *("max_position_embeddings", "layernorm_epsilon", "rotary_base"),
)
# What a configuration leaves out.
DEFAULTS = {**{name: getattr(_RELEASED, name) for name in _SIZES}, "vocab_size": _RELEASED.vocabulary.size}


class Emu3HuggingFace:
    """See :class:`megatron_cca.models.formats.HuggingFaceFormat`."""

    weights = EMU3_WEIGHTS
    marker = "model.embed_tokens.weight"
    model_types = frozenset({ORIGINAL_TYPE, "emu3", "emu3_text_model"})
    namings = (
        Naming(ORIGINAL, _FLAT),
        Naming(
            TRANSFORMERS,
            {"text_model.model.": "model.", "text_model.lm_head.": "lm_head."},
            companions={"vqmodel.": ""},
        ),
        Naming(
            TRANSFORMERS, {"model.text_model.": "model.", "lm_head.": "lm_head."}, companions={"model.vqmodel.": ""}
        ),
        Naming(LLAMA, _FLAT),
    )

    def knows(self, config: Json) -> bool:
        """See :class:`HuggingFaceFormat`."""
        return not is_emu3_5(config)

    def form(self, config: Json) -> str:
        """See :class:`HuggingFaceFormat`."""
        return TRANSFORMERS if "text_config" in config else ORIGINAL

    def read_model_config(self, config: Json) -> ModelConfig:
        """See :class:`HuggingFaceFormat`. What a configuration leaves out has the released model's value."""
        text = _text_section(config)
        check_section(text, "Emu3")
        check_untied(text, "Emu3")
        sizes = read_sizes(text, DEFAULTS)
        presets = [name for name, preset in PRESETS.items() if preset.vocabulary.size == sizes["vocab_size"]]
        return ModelConfig(
            name=[*presets, "emu3-8b"][0], rotary_base=rotary_base(text, DEFAULTS["rotary_base"]), **sizes
        )

    def write_config(self, template: Json | None, architecture: Architecture, dtype: str, form: str) -> Json:
        """See :class:`HuggingFaceFormat`."""
        if form == LLAMA:
            return stock_config(architecture, dtype)
        config = self._like(template, architecture, form)
        text = _text_section(config)
        write_sizes(text, architecture, DEFAULTS)
        write_dtype(config, text, dtype)
        return config

    def _like(self, template: Json | None, architecture: Architecture, form: str) -> Json:
        if template is not None and self.form(template) == form:
            return copy.deepcopy(template)
        if form == TRANSFORMERS:
            raise UserError("the image tokenizer (vqmodel) is missing; give a template in that form")
        text = copy.deepcopy(_text_section(template)) if template is not None else fresh_section(architecture)
        return {**text, "architectures": ["Emu3ForCausalLM"], "model_type": "emu3_text_model"}

    def companion_shapes(self, config: Json, found: Shapes) -> Shapes:
        """See :class:`HuggingFaceFormat`: the image tokenizer's, by transformers' own class."""
        if self.form(config) != TRANSFORMERS:
            return {}
        import torch
        from transformers import Emu3VQVAE, Emu3VQVAEConfig

        form, section = recognise(config)
        sizes = sizes_in(section, form, _MOST_TENSORS)
        with error_context("vq_config"), transformers_refusals(), torch.device("meta"):
            tokenizer = Emu3VQVAE(Emu3VQVAEConfig(**sizes))
        return {name: tuple(tensor.shape) for name, tensor in tokenizer.state_dict().items()}

    def transformers_model(self, config: Json):
        """See :class:`HuggingFaceFormat`."""
        import torch
        from transformers import Emu3ForCausalLM, Emu3TextConfig

        text = {"rms_norm_eps": DEFAULTS["layernorm_epsilon"], **_text_section(config)}
        with error_context(CONFIG), transformers_refusals():
            settings = Emu3TextConfig(**settings_of(text))
            with torch.device("meta"):
                model = Emu3ForCausalLM(settings)
            model.model.rotary_emb = type(model.model.rotary_emb)(settings)
        return model.eval()


def is_emu3_5(config: Json) -> bool:
    """Return whether a configuration in the form of Emu3's authors is of their Emu3.5.

    Its heads together are not as wide as the residual stream. The sizes of the released vocabularies decide first.
    """
    size = config.get("vocab_size")
    if config.get("model_type") != ORIGINAL_TYPE or size == DEFAULTS["vocab_size"]:
        return False
    hidden, heads, channels = (config.get(key) for key in ("hidden_size", "num_attention_heads", "head_dim"))
    is_told = all(type(number) is int for number in (hidden, heads, channels))
    return size == _VOCABULARY_OF_EMU3_5 or (is_told and heads * channels != hidden)


def _text_section(config: Json) -> Json:
    text = config.get("text_config", config)
    if not isinstance(text, dict):
        raise UserError(f"text_config: must be an object, found {text!r}")
    return text


def fresh_section(architecture: Architecture) -> Json:
    """Return the configuration of a decoder without its sizes.

    Raises:
        UserError: the meaning of the model's ids is not known.
    """
    vocabulary = architecture.vocabulary
    if not isinstance(vocabulary, Emu3Vocabulary):
        raise UserError(
            f"the meaning of its {vocabulary.size} token ids is not known here; give the folder that it came from as a "
            "template"
        )
    return {
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": vocabulary.bos,
        "eos_token_id": vocabulary.eos,
        "pad_token_id": vocabulary.pad,
    }
