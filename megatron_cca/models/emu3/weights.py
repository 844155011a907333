"""Emu3 on Hugging Face, in both of its forms, and its tensors under Megatron's names and under transformers'.

original      baaivision/Emu3's repositories (and what transformers' ``Emu3ForCausalLM`` saves): one flat decoder.
transformers  ``Emu3ForConditionalGeneration``: the decoder as ``text_model`` and the image tokenizer as ``vqmodel`` in
              one folder, under these names or, saved with ``save_original_format=False``, under those in memory.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

from megatron_cca.config import ModelConfig
from megatron_cca.errors import UserError, error_context
from megatron_cca.models.architecture import Architecture
from megatron_cca.models.emu3 import PRESETS, Emu3Vocabulary
from megatron_cca.models.emu3.vq_files import recognise, sizes_in
from megatron_cca.models.formats import Json, Shapes, transformers_refusals
from megatron_cca.models.llama_files import LLAMA_LAYERS
from megatron_cca.models.naming import Naming
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

_SIZES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "max_position_embeddings": "max_position_embeddings",
    "layernorm_epsilon": "rms_norm_eps",
}

_RELEASED = PRESETS["emu3-8b"]

# A limit for the network that is built of a configuration before it is compared with the tensors.
_MOST_TENSORS = 2000

# Switches whose other values would make another model than the one built here.
_FIXED = {
    "hidden_act": ("silu",),
    "tie_word_embeddings": (False,),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "rope_scaling": (None,),
}


class Emu3HuggingFace:
    """See :class:`megatron_cca.models.formats.HuggingFaceFormat`."""

    weights = EMU3_WEIGHTS
    marker = "model.embed_tokens.weight"
    model_types = frozenset({"Emu3", "emu3", "emu3_text_model"})
    namings = (
        Naming(
            ORIGINAL,
            {name: name for name in ("model.embed_tokens.", "model.layers.", "model.norm.", "lm_head.")},
        ),
        Naming(
            TRANSFORMERS,
            {"text_model.model.": "model.", "text_model.lm_head.": "lm_head."},
            companions={"vqmodel.": ""},
        ),
        Naming(
            TRANSFORMERS, {"model.text_model.": "model.", "lm_head.": "lm_head."}, companions={"model.vqmodel.": ""}
        ),
    )

    def form(self, config: Json) -> str:
        """See :class:`HuggingFaceFormat`."""
        return TRANSFORMERS if "text_config" in config else ORIGINAL

    def read_model_config(self, config: Json) -> ModelConfig:
        """See :class:`HuggingFaceFormat`. What a configuration leaves out has the released model's value."""
        text = _text_section(config)
        _check_switches(text)
        sizes = {ours: text.get(theirs, getattr(_RELEASED, ours)) for ours, theirs in _SIZES.items()}
        sizes["vocab_size"] = text.get("vocab_size", _RELEASED.vocabulary.size)
        for ours, size in sizes.items():
            if ours == "layernorm_epsilon":
                _must_be_positive(_SIZES[ours], size)
            elif isinstance(size, bool) or not isinstance(size, int) or size <= 0:
                raise UserError(f"{_SIZES.get(ours, ours)}: must be a positive integer, found {size!r}")
        _check_heads(text, sizes)
        presets = [name for name, preset in PRESETS.items() if preset.vocabulary.size == sizes["vocab_size"]]
        return ModelConfig(name=[*presets, "emu3-8b"][0], rotary_base=_rotary_base(text), **sizes)

    def write_config(self, template: Json | None, architecture: Architecture, dtype: str, form: str) -> Json:
        """See :class:`HuggingFaceFormat`."""
        config = self._like(template, architecture, form)
        text = _text_section(config)
        for ours, theirs in _SIZES.items():
            _write(text, theirs, getattr(architecture, ours), getattr(_RELEASED, ours))
        if text.get("head_dim") is not None:
            text["head_dim"] = architecture.kv_channels
        _write(text, "vocab_size", architecture.vocabulary.size, _RELEASED.vocabulary.size)
        if _rotary_base(text) != architecture.rotary_base:
            _write_rotary_base(text, architecture.rotary_base)
        for section in (config, text):
            for key in ("dtype", "torch_dtype"):
                if key in section:
                    section[key] = dtype
        if not {"dtype", "torch_dtype"} & config.keys():
            config["dtype"] = dtype
        return config

    def _like(self, template: Json | None, architecture: Architecture, form: str) -> Json:
        if template is not None and self.form(template) == form:
            return copy.deepcopy(template)
        if form == TRANSFORMERS:
            raise UserError("the image tokenizer (vqmodel) is missing; give a template in that form")
        text = copy.deepcopy(_text_section(template)) if template is not None else _fresh_text_section(architecture)
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

        # The last two can name code that would be fetched from a hub.
        left_out = ("model_type", "auto_map", "dtype", "torch_dtype", "quantization_config", "attn_implementation")
        text = _text_section(config)
        kept = {key: value for key, value in text.items() if key not in left_out and not key.startswith("_")}
        with error_context(CONFIG), transformers_refusals():
            # JSON has one kind of number. transformers needs a float here.
            epsilon = float(text.get("rms_norm_eps", _RELEASED.layernorm_epsilon))
            settings = Emu3TextConfig(**kept | {"rms_norm_eps": epsilon})
            with torch.device("meta"):
                model = Emu3ForCausalLM(settings)
            model.model.rotary_emb = type(model.model.rotary_emb)(settings)
        return model.eval()


def _text_section(config: Json) -> Json:
    text = config.get("text_config", config)
    if not isinstance(text, dict):
        raise UserError(f"text_config: must be an object, found {text!r}")
    return text


def _rope(text: Mapping) -> Mapping:
    rope = text.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(f"rope_parameters: must be an object, found {rope!r}")
    return rope


def _must_be_positive(key: str, number: object) -> None:
    is_number = isinstance(number, int | float) and not isinstance(number, bool)
    if not is_number or not math.isfinite(number) or number <= 0:
        raise UserError(f"{key}: must be a positive number, found {number!r}")


def _check_heads(text: Mapping, sizes: Mapping) -> None:
    hidden, heads, groups = (sizes[name] for name in ("hidden_size", "num_attention_heads", "num_query_groups"))
    if hidden % heads:
        raise UserError(f"num_attention_heads: {heads} does not divide hidden_size {hidden}")
    if heads % groups:
        raise UserError(f"num_key_value_heads: {groups} does not divide num_attention_heads {heads}")
    if text.get("head_dim") not in (None, hidden // heads):
        raise UserError(
            f"head_dim: {text['head_dim']} is not hidden_size / num_attention_heads, {hidden // heads}: not an Emu3"
        )


def _check_switches(text: Mapping) -> None:
    for key, allowed in _FIXED.items():
        if key in text and text[key] not in allowed:
            raise UserError(f"{key}: {text[key]!r} is not what Emu3 has, {allowed[0]!r}")
    for key in ("rope_type", "type"):  # the second is the older spelling
        kind = _rope(text).get(key, "default")
        if kind != "default":
            raise UserError(f"rope_parameters.{key}: {kind!r} is not what Emu3 has, 'default'")


def _write(text: Json, key: str, value: float, default: float) -> None:
    """Set a key of a configuration, unless it has the value already."""
    if text.get(key, default) != value:
        text[key] = value


def _rotary_base(text: Mapping) -> float:
    base = _rope(text).get("rope_theta", text.get("rope_theta"))
    if base is None:
        return float(_RELEASED.rotary_base)
    _must_be_positive("rope_theta", base)
    return float(base)


def _write_rotary_base(text: Json, base: float) -> None:
    if text.get("rope_parameters"):
        text["rope_parameters"]["rope_theta"] = base
    elif "rope_theta" in text:
        text["rope_theta"] = base
    else:
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": base}


def _fresh_text_section(architecture: Architecture) -> Json:
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
