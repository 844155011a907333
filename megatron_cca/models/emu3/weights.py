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
from megatron_cca.models.emu3 import EMU3_VOCABULARY, PRESETS, Emu3Vocabulary
from megatron_cca.models.emu3.vq_files import recognise, sizes_in, transformers_refusals
from megatron_cca.models.formats import Json, Naming
from megatron_cca.models.weight_files import CONFIG
from megatron_cca.models.weight_map import GatedMLP, GroupedQueryQKV, OneToOne, WeightMap

_MEGATRON = "decoder.layers."
_TRANSFORMERS = "model.layers.{layer}."

EMU3_WEIGHTS = WeightMap(
    rules=[
        OneToOne("embedding.word_embeddings.weight", "model.embed_tokens.weight", ("vocab", "hidden")),
        OneToOne(
            f"{_MEGATRON}self_attention.linear_qkv.layer_norm_weight",
            f"{_TRANSFORMERS}input_layernorm.weight",
            ("hidden",),
        ),
        GroupedQueryQKV(
            f"{_MEGATRON}self_attention.linear_qkv.weight",
            query=f"{_TRANSFORMERS}self_attn.q_proj.weight",
            key=f"{_TRANSFORMERS}self_attn.k_proj.weight",
            value=f"{_TRANSFORMERS}self_attn.v_proj.weight",
        ),
        OneToOne(
            f"{_MEGATRON}self_attention.linear_proj.weight",
            f"{_TRANSFORMERS}self_attn.o_proj.weight",
            ("hidden", "query"),
        ),
        OneToOne(
            f"{_MEGATRON}mlp.linear_fc1.layer_norm_weight",
            f"{_TRANSFORMERS}post_attention_layernorm.weight",
            ("hidden",),
        ),
        GatedMLP(
            f"{_MEGATRON}mlp.linear_fc1.weight",
            gate=f"{_TRANSFORMERS}mlp.gate_proj.weight",
            up=f"{_TRANSFORMERS}mlp.up_proj.weight",
        ),
        OneToOne(f"{_MEGATRON}mlp.linear_fc2.weight", f"{_TRANSFORMERS}mlp.down_proj.weight", ("hidden", "ffn")),
        OneToOne("decoder.final_layernorm.weight", "model.norm.weight", ("hidden",)),
        OneToOne("output_layer.weight", "lm_head.weight", ("vocab", "hidden")),
    ]
)


ORIGINAL, TRANSFORMERS = "original", "transformers"

# Emu3 and Emu3.5 have the same model_type in their authors' form.
ORIGINAL_TYPE = "Emu3"
_VOCABULARY_OF_EMU3_5 = 282_926

_SIZES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "max_position_embeddings": "max_position_embeddings",
    "layernorm_epsilon": "rms_norm_eps",
}

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
    model_types = frozenset({ORIGINAL_TYPE, "emu3", "emu3_text_model"})
    # What messages call it, its sizes, the released one first, and the model_type of an export without a template.
    owner, presets, exported_type = "Emu3", PRESETS, "emu3_text_model"
    # The sizes that a configuration leaves out.
    defaults = PRESETS["emu3-8b"]
    # The sizes that a configuration may have, and their keys there.
    size_keys: Mapping[str, str] = _SIZES
    # Keys of the section ``model`` that no configuration says.
    options: Mapping[str, bool] = {}
    namings = (
        Naming(
            ORIGINAL,
            {name: name for name in ("model.embed_tokens.", "model.layers.", "model.norm.", "lm_head.")},
        ),
        Naming(
            TRANSFORMERS,
            {"text_model.model.": "model.", "text_model.lm_head.": "lm_head."},
            companion_prefix="vqmodel.",
        ),
        Naming(
            TRANSFORMERS, {"model.text_model.": "model.", "lm_head.": "lm_head."}, companion_prefix="model.vqmodel."
        ),
    )

    def knows(self, config: Json) -> bool:
        """See :class:`HuggingFaceFormat`."""
        kind = config.get("model_type")
        return isinstance(kind, str) and kind in self.model_types and not is_emu3_5(config)

    def form(self, config: Json) -> str:
        """See :class:`HuggingFaceFormat`."""
        return TRANSFORMERS if "text_config" in config else ORIGINAL

    def read_model_config(self, config: Json) -> ModelConfig:
        """See :class:`HuggingFaceFormat`. What a configuration leaves out has the authors' default."""
        text = _text_section(config)
        self._check_switches(text)
        sizes = {ours: text.get(theirs, getattr(self.defaults, ours)) for ours, theirs in self.size_keys.items()}
        sizes["vocab_size"] = text.get("vocab_size", self.defaults.vocabulary.size)
        for ours, size in sizes.items():
            if ours == "layernorm_epsilon":
                _must_be_positive(self.size_keys[ours], size)
            elif isinstance(size, bool) or not isinstance(size, int) or size <= 0:
                raise UserError(f"{self.size_keys.get(ours, ours)}: must be a positive integer, found {size!r}")
        self._check_heads(text, sizes)
        fitting = [name for name, preset in self.presets.items() if preset.vocabulary.size == sizes["vocab_size"]]
        base = _rotary_base(text, self.defaults.rotary_base)
        return ModelConfig(name=[*fitting, *self.presets][0], rotary_base=base, **sizes, **self.options)

    def write_config(self, template: Json | None, architecture: Architecture, dtype: str, form: str) -> Json:
        """See :class:`HuggingFaceFormat`."""
        config = self._like(template, architecture, form)
        text = _text_section(config)
        for ours, theirs in self.size_keys.items():
            _write(text, theirs, getattr(architecture, ours), getattr(self.defaults, ours))
        if text.get("head_dim") is not None:
            text["head_dim"] = architecture.kv_channels
        _write(text, "vocab_size", architecture.vocabulary.size, self.defaults.vocabulary.size)
        if _rotary_base(text, self.defaults.rotary_base) != architecture.rotary_base:
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
        return {**text, "architectures": ["Emu3ForCausalLM"], "model_type": self.exported_type}

    def companion_shapes(self, config: Json) -> dict[str, tuple[int, ...]] | None:
        """See :class:`HuggingFaceFormat`: the image tokenizer's, by transformers' own class."""
        if self.form(config) != TRANSFORMERS:
            return None
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

        # The last two can name code that would be fetched from a hub.
        left_out = ("model_type", "auto_map", "dtype", "torch_dtype", "quantization_config", "attn_implementation")
        text = _text_section(config)
        kept = {key: value for key, value in text.items() if key not in left_out and not key.startswith("_")}
        # What transformers' own defaults are for another model.
        kept |= {theirs: text.get(theirs, getattr(self.defaults, ours)) for ours, theirs in self.size_keys.items()}
        settings_class, model_class = self._transformers_classes()
        with error_context(CONFIG), transformers_refusals():
            # JSON has one kind of number. transformers needs a float here.
            settings = settings_class(**kept | {"rms_norm_eps": float(kept["rms_norm_eps"])})
            with torch.device("meta"):
                model = model_class(settings)
            model.model.rotary_emb = type(model.model.rotary_emb)(settings)
        return model.eval()

    def _transformers_classes(self) -> tuple[type, type]:
        """Return transformers' configuration and model of such decoders."""
        from transformers import Emu3ForCausalLM, Emu3TextConfig

        return Emu3TextConfig, Emu3ForCausalLM

    def _check_heads(self, text: Mapping, sizes: Mapping) -> None:
        hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
        if hidden % heads:
            raise UserError(f"num_attention_heads: {heads} does not divide hidden_size {hidden}")
        check_groups(sizes)
        if text.get("head_dim") not in (None, hidden // heads):
            raise UserError(
                f"head_dim: {text['head_dim']} is not hidden_size / num_attention_heads, {hidden // heads}: not an Emu3"
            )

    def _check_switches(self, text: Mapping) -> None:
        for key, allowed in _FIXED.items():
            if key in text and text[key] not in allowed:
                raise UserError(f"{key}: {text[key]!r} is not what {self.owner} has, {allowed[0]!r}")
        for key in ("rope_type", "type"):  # the second is the older spelling
            kind = _rope(text).get(key, "default")
            if kind != "default":
                raise UserError(f"rope_parameters.{key}: {kind!r} is not what {self.owner} has, 'default'")


def is_emu3_5(config: Json) -> bool:
    """Return whether a configuration in the form of Emu3's authors is of their Emu3.5.

    Its heads together are not as wide as the residual stream. The sizes of the released vocabularies decide first.
    """
    size = config.get("vocab_size")
    if config.get("model_type") != ORIGINAL_TYPE or size == EMU3_VOCABULARY.size:
        return False
    hidden, heads, channels = (config.get(key) for key in ("hidden_size", "num_attention_heads", "head_dim"))
    is_told = all(type(number) is int for number in (hidden, heads, channels))
    return size == _VOCABULARY_OF_EMU3_5 or (is_told and heads * channels != hidden)


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


def check_groups(sizes: Mapping) -> None:
    """Refuse groups of heads of several sizes. Sizes have Megatron's names."""
    heads, groups = sizes["num_attention_heads"], sizes["num_query_groups"]
    if heads % groups:
        raise UserError(f"num_key_value_heads: {groups} does not divide num_attention_heads {heads}")


def _write(text: Json, key: str, value: float, default: float) -> None:
    """Set a key of a configuration, unless it has the value already."""
    if text.get(key, default) != value:
        text[key] = value


def _rotary_base(text: Mapping, default: float) -> float:
    base = _rope(text).get("rope_theta", text.get("rope_theta"))
    if base is None:
        return float(default)
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
