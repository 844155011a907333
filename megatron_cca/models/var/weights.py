"""VAR's tensors under Megatron's names and under the authors' (FoundationVision/VAR, ``var.py``).

CCA's authors write files with the same names. The keys' bias of Megatron's model is the authors' buffer of zeros.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_cca.config import ModelConfig
from megatron_cca.errors import UserError
from megatron_cca.models.architecture import Architecture
from megatron_cca.models.formats import FrozenFile, Shapes, Sizes, WeightsFileFormat, check_given_sizes, float32_copy
from megatron_cca.models.pyramid import num_codes
from megatron_cca.models.scale_features import NUM_CONVOLUTIONS
from megatron_cca.models.var import PREFIX_TOKENS, PRESETS, RELEASED
from megatron_cca.models.var.image_tokenizer import CONVOLUTIONS, feature_weights, quantizer_shapes
from megatron_cca.models.vq_files import CODEBOOK
from megatron_cca.models.weight_files import contents_of, equal_tensors, same_tensors, sets_in
from megatron_cca.models.weight_map import GroupedQueryQKV, OneToOne, StackedQKV, WeightMap

_MEGATRON = "decoder.layers."
_AUTHORS = "blocks.{layer}."
_POSITIONS, _LEVELS, _FEATURES = "pos_1LC", "lvl_embed.weight", "word_embed.weight"
_CLASSES, _HEAD = "class_emb.weight", "head.weight"
_FIRST_SHARPNESS, _FIRST_FFN = "blocks.0.attn.scale_mul_1H11", "blocks.0.ffn.fc1.weight"
_LEVEL_OF_POSITION, _MASK = "lvl_1L", "attn_bias_for_masking"
# For values that all sizes have in common.
_ANY = PRESETS[RELEASED[0]]

VAR_WEIGHTS = WeightMap(
    rules=[
        OneToOne("embedding.classes", _CLASSES, ("input_only", "hidden")),
        OneToOne("embedding.start", "pos_start", ("one", "first", "hidden")),
        OneToOne("embedding.positions", _POSITIONS, ("one", "positions", "hidden")),
        OneToOne("embedding.levels", _LEVELS, ("levels", "hidden")),
        OneToOne("embedding.feature_weight", _FEATURES, ("hidden", "features")),
        OneToOne("embedding.feature_bias", "word_embed.bias", ("hidden",)),
        OneToOne(f"{_MEGATRON}modulation.linear.weight", f"{_AUTHORS}ada_lin.1.weight", ("six_hidden", "hidden")),
        OneToOne(f"{_MEGATRON}modulation.linear.bias", f"{_AUTHORS}ada_lin.1.bias", ("six_hidden",)),
        StackedQKV(f"{_MEGATRON}self_attention.linear_qkv.weight", f"{_AUTHORS}attn.mat_qkv.weight"),
        GroupedQueryQKV(
            f"{_MEGATRON}self_attention.linear_qkv.bias",
            query=f"{_AUTHORS}attn.q_bias",
            key=f"{_AUTHORS}attn.zero_k_bias",
            value=f"{_AUTHORS}attn.v_bias",
            are_biases=True,
        ),
        OneToOne(
            f"{_MEGATRON}self_attention.q_layernorm.log_sharpness",
            f"{_AUTHORS}attn.scale_mul_1H11",
            ("one", "heads", "one", "one"),
        ),
        OneToOne(f"{_MEGATRON}self_attention.linear_proj.weight", f"{_AUTHORS}attn.proj.weight", ("hidden", "query")),
        OneToOne(f"{_MEGATRON}self_attention.linear_proj.bias", f"{_AUTHORS}attn.proj.bias", ("hidden",)),
        OneToOne(f"{_MEGATRON}mlp.linear_fc1.weight", f"{_AUTHORS}ffn.fc1.weight", ("ffn", "hidden")),
        OneToOne(f"{_MEGATRON}mlp.linear_fc1.bias", f"{_AUTHORS}ffn.fc1.bias", ("ffn",)),
        OneToOne(f"{_MEGATRON}mlp.linear_fc2.weight", f"{_AUTHORS}ffn.fc2.weight", ("hidden", "ffn")),
        OneToOne(f"{_MEGATRON}mlp.linear_fc2.bias", f"{_AUTHORS}ffn.fc2.bias", ("hidden",)),
        OneToOne("final_modulation.linear.weight", "head_nm.ada_lin.1.weight", ("two_hidden", "hidden")),
        OneToOne("final_modulation.linear.bias", "head_nm.ada_lin.1.bias", ("two_hidden",)),
        OneToOne("output_layer.weight", _HEAD, ("output", "hidden")),
        OneToOne("output_layer.bias", "head.bias", ("output",)),
    ]
)


def read_features(path: Path, architecture: Architecture) -> dict[str, Tensor]:
    """Return codebook and convolutions of an image tokenizer's file, float32, by Megatron's keys.

    Raises:
        UserError: no such file, or one of other sizes. Names the tensor, not the file.
    """
    sets = sets_in(contents_of(path), (CODEBOOK,), path.stat().st_size)
    if not sets:
        raise UserError(f"holds no tensor {CODEBOOK}, so that it is no image tokenizer of VAR")
    if not same_tensors(sets, equal_tensors):
        raise UserError(f"holds {len(sets)} image tokenizers that differ ({', '.join(one.place for one in sets)})")
    found, channels = sets[0].weights, architecture.feature_channels
    wanted = quantizer_shapes(architecture.vocabulary.codebook_size, channels)
    for name, shape in wanted.items():
        if name not in found:
            raise UserError(f"tensor {name} is missing")
        if tuple(found[name].shape) != shape:
            raise UserError(f"tensor {name} has shape {list(found[name].shape)}, the model wants {list(shape)}")
    more = sorted(name for name in found if name.startswith(CONVOLUTIONS) and name not in wanted)
    if more:
        raise UserError(f"tensor {more[0]} is one too many: VAR's scales share {NUM_CONVOLUTIONS} convolutions")
    taken = {name: float32_copy(name, found[name]) for name in wanted}
    return {f"embedding.features.{name}": tensor for name, tensor in feature_weights(taken).items()}


class VarWeightsFile(WeightsFileFormat):
    """See :class:`megatron_cca.models.formats.WeightsFileFormat`."""

    weights = VAR_WEIGHTS
    # The authors' own files hold the tensors alone. Those of a training run are found by the marker.
    sections = ()
    marker = _POSITIONS
    not_in_shapes = ("layernorm_epsilon",)
    frozen = FrozenFile("vae_ch160v4096z32.pth", "FoundationVision/var on Hugging Face", CODEBOOK, read_features)

    def knows(self, names: Collection[str]) -> bool:
        """Return whether the tables of positions and of scales are there."""
        return _POSITIONS in names and _LEVELS in names

    def read_model_config(self, shapes: Shapes, given: Sizes, assumed: Sizes) -> ModelConfig:
        """See the protocol. The scales are those of a model known here, because shapes tell only their number."""
        if any(name.startswith("shared_ada_lin.") or name.endswith(".ada_gss") for name in shapes):
            raise UserError(
                "looks like VAR-d36 for 512 pixels, whose layers share one modulation; known here are "
                f"{', '.join(RELEASED)} and models of their kind"
            )
        dimensions = {
            _CLASSES: 2,
            _HEAD: 2,
            _FEATURES: 2,
            _LEVELS: 2,
            _POSITIONS: 3,
            _FIRST_SHARPNESS: 4,
            _FIRST_FFN: 2,
        }
        for name, number in dimensions.items():
            if len(shapes.get(name, ())) != number:
                raise UserError(f"looks like VAR, but tensor {name} is missing or has not {number} dimensions")
        known = _sizes_in_shapes(shapes)
        if min(known.values()) < 1:
            raise UserError(f"looks like VAR, but of {_in_words(known)}")
        name = _name_of(known, shapes)
        epsilons = (place["layernorm_epsilon"] for place in (given, assumed) if "layernorm_epsilon" in place)
        sizes = known | {"layernorm_epsilon": next(epsilons, _ANY.layernorm_epsilon)}
        check_given_sizes(given, sizes)
        return ModelConfig(name=name, vocab_size=sizes["codebook_size"] + sizes["num_classes"] + 1, **sizes)

    def buffers(self, architecture: Architecture) -> dict[str, Tensor]:
        """Return the level of each position, and the mask as numbers that are added to scores."""
        sides = torch.tensor(architecture.scales)
        levels = torch.arange(len(sides)).repeat_interleave(sides**2)
        mask = torch.zeros(len(levels), len(levels)).masked_fill_(levels[:, None] < levels, -torch.inf)
        return {_LEVEL_OF_POSITION: levels[None], _MASK: mask[None, None]}

    def must_be_zero(self, name: str) -> bool:
        """Return whether this is the keys' bias, which the authors do not train."""
        return name.endswith(".zero_k_bias")


def _sizes_in_shapes(shapes: Shapes) -> dict[str, int]:
    layers = {int(match[1]) for name in shapes if (match := re.match(r"blocks\.(\d{1,6})\.", name))}
    heads = shapes[_FIRST_SHARPNESS][1]
    return {
        "num_layers": len(layers),
        "hidden_size": shapes[_POSITIONS][2],
        "ffn_hidden_size": shapes[_FIRST_FFN][0],
        "num_attention_heads": heads,
        "num_query_groups": heads,
        "max_position_embeddings": PREFIX_TOKENS + shapes[_POSITIONS][1],
        "codebook_size": shapes[_HEAD][0],
        "num_classes": shapes[_CLASSES][0] - 1,
    }


def _name_of(known: Mapping[str, int], shapes: Shapes) -> str:
    """Return the name of the preset of these sizes, or of the first preset with the same pyramid."""
    pyramid = (shapes[_LEVELS][0], shapes[_POSITIONS][1], shapes[_FEATURES][1])
    alike = {name: preset for name, preset in PRESETS.items() if _pyramid_of(preset) == pyramid}
    if not alike:
        released = "{} scales, {} codes, {} channels".format(*_pyramid_of(_ANY))
        raise UserError(
            f"looks like a VAR of {_in_words(known)}, with {pyramid[0]} scales and features of {pyramid[2]} channels; "
            f"known here are pyramids of {released}"
        )
    return next((name for name, preset in alike.items() if _sizes_of(preset) == known), next(iter(alike)))


def _pyramid_of(preset: Architecture) -> tuple[int, int, int]:
    return len(preset.scales), num_codes(preset.scales), preset.feature_channels


def _sizes_of(preset: Architecture) -> dict[str, int]:
    names = (
        *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups"),
        "max_position_embeddings",
    )
    vocabulary = preset.vocabulary
    of_ids = {"codebook_size": vocabulary.codebook_size, "num_classes": vocabulary.num_classes}
    return {name: getattr(preset, name) for name in names} | of_ids


def _in_words(sizes: Mapping[str, int]) -> str:
    return (
        f"{sizes['num_layers']} layers of {sizes['hidden_size']} (FFN {sizes['ffn_hidden_size']}), "
        f"{sizes['num_attention_heads']} heads, {sizes['codebook_size']} codes, {sizes['num_classes']} classes, "
        f"{sizes['max_position_embeddings'] - PREFIX_TOKENS} codes an image"
    )
