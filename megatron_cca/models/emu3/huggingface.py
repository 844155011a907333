"""Emu3 on Hugging Face, in both of its forms.

original      baaivision/Emu3's repositories (and what transformers' ``Emu3ForCausalLM`` saves): one flat decoder.
transformers  ``Emu3ForConditionalGeneration``: the decoder as ``text_model`` and the image tokenizer as ``vqmodel`` in
              one folder, under these names or, saved with ``save_original_format=False``, under those in memory.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

from megatron_cca.config import ModelConfig
from megatron_cca.errors import UserError
from megatron_cca.models.architecture import Architecture
from megatron_cca.models.emu3.presets import PRESETS
from megatron_cca.models.emu3.vocabulary import Emu3Vocabulary
from megatron_cca.models.emu3.weights import EMU3_WEIGHTS
from megatron_cca.models.huggingface import Json, Naming

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

# Switches that would make it another model than the one built here.
_FIXED = {
    "hidden_act": ("silu",),
    "tie_word_embeddings": (False,),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "rope_scaling": (None,),
}


class Emu3HuggingFace:
    """See :class:`megatron_cca.models.huggingface.HuggingFaceFormat`."""

    weights = EMU3_WEIGHTS
    model_types = frozenset({"Emu3", "emu3", "emu3_text_model"})
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
            number = int | float if ours == "layernorm_epsilon" else int
            if isinstance(size, bool) or not isinstance(size, number) or size <= 0:
                raise UserError(f"{_SIZES.get(ours, ours)}: must be a positive number, found {size!r}")
        head_size = sizes["hidden_size"] // sizes["num_attention_heads"]
        if text.get("head_dim") not in (None, head_size):
            raise UserError(
                f"head_dim: {text['head_dim']} is not hidden_size / num_attention_heads, {head_size}: not an Emu3"
            )
        presets = [name for name, preset in PRESETS.items() if preset.vocabulary.size == sizes["vocab_size"]]
        return ModelConfig(name=[*presets, "emu3-8b"][0], rotary_base=_rotary_base(text), **sizes)

    def write_config(self, template: Json | None, architecture: Architecture, dtype: str, form: str) -> Json:
        """See :class:`HuggingFaceFormat`."""
        config = self._like(template, architecture, form)
        text = _text_section(config)
        for ours, theirs in _SIZES.items():
            _write(text, theirs, getattr(architecture, ours), getattr(_RELEASED, ours))
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
            raise UserError(
                "--format transformers: the image tokenizer (vqmodel) is missing; give --hf-template with a folder in "
                "that form"
            )
        text = copy.deepcopy(template["text_config"]) if template is not None else _fresh_text_section(architecture)
        return {**text, "architectures": ["Emu3ForCausalLM"], "model_type": "emu3_text_model"}

    def companion_shapes(self, config: Json) -> dict[str, tuple[int, ...]] | None:
        """See :class:`HuggingFaceFormat`: the image tokenizer's, by transformers' own class."""
        if self.form(config) != TRANSFORMERS:
            return None
        import torch
        from transformers import Emu3VQVAE, Emu3VQVAEConfig

        with torch.device("meta"):
            tokenizer = Emu3VQVAE(Emu3VQVAEConfig(**config.get("vq_config", {})))
        return {name: tuple(tensor.shape) for name, tensor in tokenizer.state_dict().items()}

    def transformers_model(self, config: Json):
        """See :class:`HuggingFaceFormat`."""
        import torch
        from transformers import Emu3ForCausalLM, Emu3TextConfig

        left_out = ("model_type", "auto_map", "dtype", "torch_dtype")
        settings = Emu3TextConfig(**{key: value for key, value in _text_section(config).items() if key not in left_out})
        with torch.device("meta"):
            model = Emu3ForCausalLM(settings)
        model.model.rotary_emb = type(model.model.rotary_emb)(settings)
        return model.eval()


def _text_section(config: Json) -> Json:
    return config.get("text_config", config)


def _check_switches(text: Mapping) -> None:
    for key, allowed in _FIXED.items():
        if key in text and text[key] not in allowed:
            raise UserError(f"{key}: {text[key]!r} is not what Emu3 has, {allowed[0]!r}")
    kind = (text.get("rope_parameters") or {}).get("rope_type", "default")
    if kind != "default":
        raise UserError(f"rope_parameters.rope_type: {kind!r} is not what Emu3 has, 'default'")


def _write(text: Json, key: str, value: float, default: float) -> None:
    """Leave a configuration as it is where it says so already."""
    if text.get(key, default) != value:
        text[key] = value


def _rotary_base(text: Mapping) -> float:
    base = (text.get("rope_parameters") or {}).get("rope_theta", text.get("rope_theta"))
    return float(_RELEASED.rotary_base if base is None else base)


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
            f"--checkpoint: the meaning of its {vocabulary.size} token ids is not known here; give --hf-template with "
            "the folder that it came from"
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
