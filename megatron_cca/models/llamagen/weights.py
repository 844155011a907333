"""LlamaGen's tensors under Megatron's names and under the authors' (FoundationVision/LlamaGen, ``gpt.py``)."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from megatron_cca.config import ModelConfig
from megatron_cca.errors import UserError
from megatron_cca.models.architecture import Architecture
from megatron_cca.models.formats import Shapes, Sizes, WeightsFileFormat, check_given_sizes
from megatron_cca.models.llamagen import PRESETS, RELEASED
from megatron_cca.models.weight_map import GatedMLP, OneToOne, StackedQKV, StackedVocabulary, WeightMap

_MEGATRON = "decoder.layers."
_AUTHORS = "layers.{layer}."
_CODES, _CLASSES = "tok_embeddings.weight", "cls_embedding.embedding_table.weight"
_FIRST_GATE, _FIRST_QKV = "layers.0.feed_forward.w1.weight", "layers.0.attention.wqkv.weight"
_FREQUENCIES = "freqs_cis"
# For values that all sizes have in common.
_ANY = PRESETS[RELEASED[0]]

LLAMAGEN_WEIGHTS = WeightMap(
    rules=[
        StackedVocabulary("embedding.word_embeddings.weight", output=_CODES, input_only=_CLASSES),
        OneToOne(
            f"{_MEGATRON}self_attention.linear_qkv.layer_norm_weight", f"{_AUTHORS}attention_norm.weight", ("hidden",)
        ),
        StackedQKV(f"{_MEGATRON}self_attention.linear_qkv.weight", f"{_AUTHORS}attention.wqkv.weight"),
        OneToOne(
            f"{_MEGATRON}self_attention.linear_proj.weight", f"{_AUTHORS}attention.wo.weight", ("hidden", "query")
        ),
        OneToOne(f"{_MEGATRON}mlp.linear_fc1.layer_norm_weight", f"{_AUTHORS}ffn_norm.weight", ("hidden",)),
        GatedMLP(
            f"{_MEGATRON}mlp.linear_fc1.weight",
            gate=f"{_AUTHORS}feed_forward.w1.weight",
            up=f"{_AUTHORS}feed_forward.w3.weight",
        ),
        OneToOne(f"{_MEGATRON}mlp.linear_fc2.weight", f"{_AUTHORS}feed_forward.w2.weight", ("hidden", "ffn")),
        OneToOne("decoder.final_layernorm.weight", "norm.weight", ("hidden",)),
        OneToOne("output_layer.weight", "output.weight", ("output", "hidden")),
    ]
)


class LlamaGenWeightsFile(WeightsFileFormat):
    """See :class:`megatron_cca.models.formats.WeightsFileFormat`."""

    weights = LLAMAGEN_WEIGHTS
    # Keys that the authors' and CCA's samplers look for, in their order. A file of an FSDP run has none of them.
    sections = ("model", "module", "state_dict")
    marker = _CODES
    not_in_shapes = ("num_attention_heads", "max_position_embeddings", "rotary_base", "layernorm_epsilon")

    def knows(self, names: Collection[str]) -> bool:
        """Return whether the table of codes is there. Text-to-image models have it, too."""
        return _CODES in names and any(name.startswith("cls_embedding.") for name in names)

    def read_model_config(self, shapes: Shapes, given: Sizes, assumed: Sizes) -> ModelConfig:
        """See the protocol.

        Shapes give all sizes but the heads, the image's size and two constants of the authors' program. A released
        decoder with any codes and classes has the released heads, and 24 x 24 codes unless these are given.
        """
        if any(name.startswith("cls_embedding.cap_proj") for name in shapes):
            raise UserError("looks like LlamaGen's text-to-image model; only class-to-image models are known here")
        for name in (_CODES, _CLASSES, _FIRST_GATE, _FIRST_QKV):
            if len(shapes.get(name, ())) != 2:
                raise UserError(f"looks like LlamaGen, but tensor {name} is missing or no matrix")
        known = _sizes_in_shapes(shapes)
        if min(known.values()) < 1:
            raise UserError(f"looks like LlamaGen, but of {_in_words(known)}")
        name, preset = _name_and_preset(known)
        sizes = known | self._sizes_not_in_shapes(shapes, given, assumed, preset)
        missing = [key for key in self.not_in_shapes if sizes[key] is None]
        if missing:
            raise UserError(_request_for(known, missing))
        sizes["num_query_groups"] = _query_groups(shapes, sizes["num_attention_heads"])
        check_given_sizes(given, sizes)
        return ModelConfig(name=name, vocab_size=sizes["codebook_size"] + sizes["num_classes"] + 1, **sizes)

    def _sizes_not_in_shapes(
        self, shapes: Shapes, given: Sizes, assumed: Sizes, preset: Architecture | None
    ) -> dict[str, float | None]:
        """Return the sizes in ``not_in_shapes``. None where nothing gives a size."""
        usual = {} if preset is None else {key: getattr(preset, key) for key in self.not_in_shapes}
        buffer = _sizes_in_frequencies(shapes)
        places = {
            "num_attention_heads": (buffer, given, usual, assumed),
            # A released decoder may have either size of images, so its default comes last.
            "max_position_embeddings": (buffer, given, assumed, usual),
            "rotary_base": (given, assumed, vars(_ANY)),
            "layernorm_epsilon": (given, assumed, vars(_ANY)),
        }
        return {key: next((place[key] for place in places[key] if key in place), None) for key in self.not_in_shapes}


def _sizes_in_shapes(shapes: Shapes) -> dict[str, int]:
    layers = {int(match[1]) for name in shapes if (match := re.match(r"layers\.(\d{1,6})\.", name))}
    return {
        "num_layers": len(layers),
        "hidden_size": shapes[_CODES][1],
        "ffn_hidden_size": shapes[_FIRST_GATE][0],
        "codebook_size": shapes[_CODES][0],
        "num_classes": shapes[_CLASSES][0] - 1,
    }


def _sizes_in_frequencies(shapes: Shapes) -> dict[str, int]:
    """Return the sizes in ``freqs_cis``, ``[positions, channels of a head / 2, 2]``, which some programs save."""
    shape, hidden = shapes.get(_FREQUENCIES, ()), shapes[_CODES][1]
    if len(shape) != 3 or shape[2] != 2 or not shape[1] or hidden % (2 * shape[1]):
        return {}
    return {"max_position_embeddings": shape[0], "num_attention_heads": hidden // (2 * shape[1])}


def _name_and_preset(known: Mapping[str, int]) -> tuple[str, Architecture | None]:
    """Return name and preset of these sizes, or of a released decoder, or the family's first name and None."""
    for name, preset in PRESETS.items():
        if _sizes_of(preset) == known:
            return name, preset
    for name in RELEASED:
        if all(getattr(PRESETS[name], key) == known[key] for key in ("num_layers", "hidden_size", "ffn_hidden_size")):
            return name, PRESETS[name]
    return RELEASED[0], None


def _sizes_of(preset: Architecture) -> dict[str, int]:
    vocabulary = preset.vocabulary
    decoder = {key: getattr(preset, key) for key in ("num_layers", "hidden_size", "ffn_hidden_size")}
    return decoder | {"codebook_size": vocabulary.codebook_size, "num_classes": vocabulary.num_classes}


def _query_groups(shapes: Shapes, heads: float) -> int:
    rows, hidden = shapes[_FIRST_QKV]
    keys = (rows - hidden) // 2
    groups, rest = divmod(keys * int(heads), hidden)
    if rest or groups < 1 or (rows - hidden) % 2:
        raise UserError(f"tensor {_FIRST_QKV} has {rows} rows, which {heads} query heads cannot have")
    return groups


def _request_for(known: Mapping[str, int], missing: Collection[str]) -> str:
    examples = {"num_attention_heads": "N", "max_position_embeddings": "577 (the class and 24 x 24 codes)"}
    said = " ".join(f"--set model.{key}={examples[key]}" for key in missing)
    return (
        f"looks like a LlamaGen of {_in_words(known)}, which is none of those known here ({', '.join(PRESETS)}), and "
        f"its tensors do not tell {' and '.join(missing)}; give {said}"
    )


def _in_words(sizes: Mapping[str, int]) -> str:
    return (
        f"{sizes['num_layers']} layers of {sizes['hidden_size']} (FFN {sizes['ffn_hidden_size']}), "
        f"{sizes['codebook_size']} codes, {sizes['num_classes']} classes"
    )
