"""LlamaGen's tensors under Megatron's names and under the authors' (FoundationVision/LlamaGen, ``gpt.py``)."""

from __future__ import annotations

import re
from collections.abc import Collection

from megatron_cca.config import ModelConfig
from megatron_cca.errors import UserError
from megatron_cca.models.architecture import Architecture, with_explicit_sizes
from megatron_cca.models.llamagen.presets import PRESETS
from megatron_cca.models.weight_map import GatedMLP, OneToOne, StackedQKV, StackedVocabulary, WeightMap
from megatron_cca.models.weights_file import Shapes

_OURS = "decoder.layers."
_THEIRS = "layers.{layer}."
_CODES, _CLASSES = "tok_embeddings.weight", "cls_embedding.embedding_table.weight"
_FIRST_GATE = "layers.0.feed_forward.w1.weight"

LLAMAGEN_WEIGHTS = WeightMap(
    rules=[
        StackedVocabulary("embedding.word_embeddings.weight", output=_CODES, input_only=_CLASSES),
        OneToOne(f"{_OURS}self_attention.linear_qkv.layer_norm_weight", f"{_THEIRS}attention_norm.weight", ("hidden",)),
        StackedQKV(f"{_OURS}self_attention.linear_qkv.weight", f"{_THEIRS}attention.wqkv.weight"),
        OneToOne(f"{_OURS}self_attention.linear_proj.weight", f"{_THEIRS}attention.wo.weight", ("hidden", "query")),
        OneToOne(f"{_OURS}mlp.linear_fc1.layer_norm_weight", f"{_THEIRS}ffn_norm.weight", ("hidden",)),
        GatedMLP(
            f"{_OURS}mlp.linear_fc1.weight",
            gate=f"{_THEIRS}feed_forward.w1.weight",
            up=f"{_THEIRS}feed_forward.w3.weight",
        ),
        OneToOne(f"{_OURS}mlp.linear_fc2.weight", f"{_THEIRS}feed_forward.w2.weight", ("hidden", "ffn")),
        OneToOne("decoder.final_layernorm.weight", "norm.weight", ("hidden",)),
        OneToOne("output_layer.weight", "output.weight", ("output", "hidden")),
    ]
)


class LlamaGenWeightsFile:
    """See :class:`megatron_cca.models.weights_file.WeightsFileFormat`."""

    weights = LLAMAGEN_WEIGHTS
    # What the authors' and CCA's samplers look for, in their order; without any it is an FSDP run's file.
    sections = ("model", "module", "state_dict")
    ignored = ("freqs_cis", "causal_mask")

    def knows(self, names: Collection[str]) -> bool:
        """By the table of codes, which text-to-image models have, too."""
        return _CODES in names and any(name.startswith("cls_embedding.") for name in names)

    def read_model_config(self, shapes: Shapes) -> ModelConfig:
        """The preset with these sizes; heads and the image's size leave no trace in shapes, and are the preset's.

        Raises:
            UserError: see the protocol.
        """
        if any(name.startswith("cls_embedding.cap_proj") for name in shapes):
            raise UserError("looks like LlamaGen's text-to-image model; only class-to-image models are known here")
        for name in (_CODES, _CLASSES, _FIRST_GATE):
            if len(shapes.get(name, ())) != 2:
                raise UserError(f"looks like LlamaGen, but tensor {name} is missing or no matrix")
        layers = {int(match[1]) for name in shapes if (match := re.match(r"layers\.(\d{1,6})\.", name))}
        found = (
            len(layers),
            shapes[_CODES][1],
            shapes[_FIRST_GATE][0],
            shapes[_CODES][0],
            shapes[_CLASSES][0] - 1,
        )
        for name, preset in PRESETS.items():
            if _told_by_shapes(preset) == found:
                return with_explicit_sizes(ModelConfig(name=name), preset)
        known = "; ".join(f"{name} {_in_words(_told_by_shapes(preset))}" for name, preset in PRESETS.items())
        raise UserError(f"looks like a LlamaGen of {_in_words(found)}, which is none of those known here: {known}")


def _told_by_shapes(preset: Architecture) -> tuple[int, int, int, int, int]:
    vocabulary = preset.vocabulary
    sizes = preset.num_layers, preset.hidden_size, preset.ffn_hidden_size
    return *sizes, vocabulary.output_size, vocabulary.size - vocabulary.output_size - 1


def _in_words(sizes: tuple[int, int, int, int, int]) -> str:
    layers, hidden, ffn, codes, classes = sizes
    return f"{layers} layers of {hidden} (FFN {ffn}), {codes} codes, {classes} classes"
