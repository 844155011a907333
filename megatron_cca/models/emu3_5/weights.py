"""Emu3.5 on Hugging Face: a Llama whose heads have a width of their own, and a norm of queries and one of keys.

transformers has no class of that name. Its Qwen3 is the same decoder.
"""

from __future__ import annotations

import copy

from megatron_cca.config import ModelConfig
from megatron_cca.errors import UserError, error_context
from megatron_cca.models.architecture import Architecture
from megatron_cca.models.emu3.weights import (
    DEFAULTS,
    ORIGINAL,
    ORIGINAL_TYPE,
    Emu3HuggingFace,
    fresh_section,
    is_emu3_5,
)
from megatron_cca.models.emu3_5 import PRESETS
from megatron_cca.models.formats import Json, Shapes, transformers_refusals
from megatron_cca.models.llama_files import (
    LLAMA_LAYERS,
    check_section,
    check_untied,
    read_sizes,
    rotary_base,
    size_keys,
    write_dtype,
    write_sizes,
)
from megatron_cca.models.stock_llama import LLAMA, stock_config
from megatron_cca.models.weight_files import CONFIG
from megatron_cca.models.weight_map import OneToOne, WeightMap

_THEIRS, _OURS = "model.layers.{layer}.self_attn.", "decoder.layers.self_attention."

EMU3_5_WEIGHTS = WeightMap(
    rules=[
        OneToOne("embedding.word_embeddings.weight", "model.embed_tokens.weight", ("vocab", "hidden")),
        *(OneToOne(f"{_OURS}{one}_layernorm.weight", f"{_THEIRS}{one}_norm.weight", ("channels",)) for one in "qk"),
        *LLAMA_LAYERS,
        OneToOne("output_layer.weight", "lm_head.weight", ("vocab", "hidden")),
    ],
    attention_options=("kv_channels", "qk_layernorm"),
)

# What a configuration leaves out is as in Emu3, whose class the authors use.
_DEFAULTS = DEFAULTS | {"kv_channels": 128}
# What transformers' Qwen3 shall take of a configuration. Its own defaults are those of another model.
_OF_QWEN3 = {"hidden_act", "attention_bias", "rope_scaling", "rope_parameters", "rope_theta", "pad_token_id"}


class Emu35HuggingFace:
    """See :class:`megatron_cca.models.formats.HuggingFaceFormat`. What is imported has the form of the authors."""

    weights = EMU3_5_WEIGHTS
    marker = Emu3HuggingFace.marker
    model_types = frozenset({ORIGINAL_TYPE})
    namings = (Emu3HuggingFace.namings[0], Emu3HuggingFace.namings[-1])

    def knows(self, config: Json) -> bool:
        """See :class:`HuggingFaceFormat`."""
        return is_emu3_5(config)

    def form(self, config: Json) -> str:
        """See :class:`HuggingFaceFormat`."""
        return ORIGINAL

    def read_model_config(self, config: Json) -> ModelConfig:
        """See :class:`HuggingFaceFormat`."""
        if "text_config" in config:
            raise UserError("text_config: Emu3.5 has one flat configuration; leave it out")
        check_section(config, "Emu3.5")
        check_untied(config, "Emu3.5")
        sizes = read_sizes(config, _DEFAULTS)
        fitting = [name for name, preset in PRESETS.items() if preset.vocabulary.size == sizes["vocab_size"]]
        base = rotary_base(config, _DEFAULTS["rotary_base"])
        return ModelConfig(name=[*fitting, "emu3_5-34b"][0], qk_layernorm=True, rotary_base=base, **sizes)

    def write_config(self, template: Json | None, architecture: Architecture, dtype: str, form: str) -> Json:
        """See :class:`HuggingFaceFormat`."""
        if form == LLAMA:
            return stock_config(architecture, dtype)
        if template is None:
            # Without the size of a head nothing tells a model with another vocabulary from an Emu3.
            own = {"architectures": ["Emu3ForCausalLM"], "model_type": ORIGINAL_TYPE}
            template = {**fresh_section(architecture), **own, "head_dim": architecture.kv_channels}
        config = copy.deepcopy(template)
        write_sizes(config, architecture, _DEFAULTS)
        write_dtype(config, config, dtype)
        return config

    def companion_shapes(self, config: Json, found: Shapes) -> Shapes:
        """See :class:`HuggingFaceFormat`. There are none."""
        return {}

    def transformers_model(self, config: Json):
        """See :class:`HuggingFaceFormat`."""
        import torch
        from transformers import Qwen3Config, Qwen3ForCausalLM

        sizes = read_sizes(config, _DEFAULTS)
        given = {key: value for key, value in config.items() if key in _OF_QWEN3 and value is not None}
        settings = {"rope_theta": _DEFAULTS["rotary_base"], "tie_word_embeddings": False, **given}
        for ours, theirs in size_keys(_DEFAULTS).items():
            settings[theirs] = float(sizes[ours]) if ours == "layernorm_epsilon" else sizes[ours]
        with error_context(CONFIG), transformers_refusals():
            settings = Qwen3Config(**settings)
            with torch.device("meta"):
                model = Qwen3ForCausalLM(settings)
            model.model.rotary_emb = type(model.model.rotary_emb)(settings)
        return model.eval()
