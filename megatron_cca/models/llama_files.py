"""What several families' files have in common: transformers' Llama, its tensors and its configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping

from megatron_cca.errors import UserError
from megatron_cca.models.architecture import Architecture
from megatron_cca.models.formats import Json
from megatron_cca.models.weight_map import GatedMLP, GroupedQueryQKV, OneToOne, Rule

_MEGATRON = "decoder.layers."
_TRANSFORMERS = "model.layers.{layer}."

# From behind the embedding to in front of the head.
LLAMA_LAYERS: tuple[Rule, ...] = (
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
)

# The sizes that a configuration may have, and their keys there.
LLAMA_SIZES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "max_position_embeddings": "max_position_embeddings",
    "layernorm_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
}

# Switches whose other values would make another model than the one built here.
_FIXED = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "rope_scaling": (None,),
}

_NO_SETTINGS = ("model_type", "auto_map", "dtype", "torch_dtype", "quantization_config", "attn_implementation")


def read_sizes(text: Mapping, defaults: Mapping[str, float]) -> dict[str, float]:
    """Return the sizes in a configuration of a Llama, by Megatron's names.

    Args:
        text: the configuration.
        defaults: the sizes that it may leave out. Query groups are the heads if they are left out in both. With
            ``kv_channels`` among them heads have a size of their own.

    Raises:
        UserError: a number is no positive one, or the heads do not divide the hidden size. Names the key.
    """
    names = size_keys(defaults)
    sizes = {ours: text.get(theirs, defaults.get(ours)) for ours, theirs in names.items()}
    if sizes["num_query_groups"] is None:
        sizes["num_query_groups"] = sizes["num_attention_heads"]
    for ours, size in sizes.items():
        if ours == "layernorm_epsilon":
            _must_be_positive(names[ours], size)
        elif isinstance(size, bool) or not isinstance(size, int) or size <= 0:
            raise UserError(f"{names[ours]}: must be a positive integer, found {size!r}")
    _check_heads(text, sizes)
    return sizes


def check_section(text: Mapping, owner: str) -> None:
    """Refuse a configuration of another model than the one built here.

    Raises:
        UserError: the value of a switch. Names the key, and the model as ``owner``.
    """
    for key, allowed in _FIXED.items():
        if key in text and text[key] not in allowed:
            raise UserError(f"{key}: {text[key]!r} is not what {owner} has, {allowed[0]!r}")
    for key in ("rope_type", "type"):  # the second is the older spelling
        kind = _rope(text).get(key, "default")
        if kind != "default":
            raise UserError(f"rope_parameters.{key}: {kind!r} is not what {owner} has, 'default'")


def check_untied(text: Mapping, owner: str) -> None:
    """Refuse a configuration whose head is its embedding, as :func:`check_section` does."""
    if text.get("tie_word_embeddings", False) is not False:
        raise UserError(f"tie_word_embeddings: {text['tie_word_embeddings']!r} is not what {owner} has, False")


def rotary_base(text: Mapping, default: float) -> float:
    """Return the base of the rotary embedding in a configuration of a Llama.

    Raises:
        UserError: it is no positive number.
    """
    base = _rope(text).get("rope_theta", text.get("rope_theta"))
    if base is None:
        return float(default)
    _must_be_positive("rope_theta", base)
    return float(base)


def write_sizes(text: Json, architecture: Architecture, defaults: Mapping[str, float]) -> None:
    """Write the sizes of the decoder into a configuration of a Llama. What it says already stays as it is."""
    found = read_sizes(text, defaults)
    for ours, theirs in size_keys(defaults).items():
        wanted = architecture.num_words if ours == "vocab_size" else getattr(architecture, ours)
        if found[ours] != wanted:
            text[theirs] = wanted
    if text.get("head_dim") is not None:
        text["head_dim"] = architecture.kv_channels
    if rotary_base(text, defaults["rotary_base"]) != architecture.rotary_base:
        _write_rotary_base(text, architecture.rotary_base)


def write_dtype(config: Json, section: Json, dtype: str) -> None:
    """Write the dtype of the weights, as torch spells it, under the keys that a configuration has for it.

    Args:
        config: the whole configuration, which gets a key if it has none.
        section: its section of the decoder, or itself.
        dtype: the dtype.
    """
    for part in (config, section):
        for key in ("dtype", "torch_dtype"):
            if key in part:
                part[key] = dtype
    if not {"dtype", "torch_dtype"} & config.keys():
        config["dtype"] = dtype


def settings_of(section: Mapping) -> Json:
    """Return what transformers' class of a decoder shall take of a section of a configuration.

    It has no key that names code, which would be fetched from a hub. JSON has one kind of number, and transformers
    needs a float in one place.
    """
    kept = {key: value for key, value in section.items() if key not in _NO_SETTINGS and not key.startswith("_")}
    return kept | ({"rms_norm_eps": float(kept["rms_norm_eps"])} if "rms_norm_eps" in kept else {})


def size_keys(defaults: Mapping[str, float]) -> dict[str, str]:
    """Return the keys of a configuration's sizes by Megatron's names. See :func:`read_sizes`."""
    return LLAMA_SIZES | ({"kv_channels": "head_dim"} if "kv_channels" in defaults else {})


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
    is_usual = "kv_channels" not in sizes
    if is_usual and hidden % heads:
        raise UserError(f"num_attention_heads: {heads} does not divide hidden_size {hidden}")
    if heads % groups:
        raise UserError(f"num_key_value_heads: {groups} does not divide num_attention_heads {heads}")
    if is_usual and text.get("head_dim") not in (None, hidden // heads):
        raise UserError(f"head_dim: {text['head_dim']} is not hidden_size / num_attention_heads, {hidden // heads}")


def _write_rotary_base(text: Json, base: float) -> None:
    if text.get("rope_parameters"):
        text["rope_parameters"]["rope_theta"] = base
    elif "rope_theta" in text:
        text["rope_theta"] = base
    else:
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": base}
