"""Small random decoders of transformers whose attention has what Emu3's has not, and a format that converts them.

No family here has such files. The format stands in for Emu3's, so that import and export of a weight map with such
tensors can be tried.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch

from megatron_cca.config import ModelConfig
from megatron_cca.models import FAMILIES
from megatron_cca.models.emu3.weights import EMU3_WEIGHTS, Emu3HuggingFace
from megatron_cca.models.naming import Naming
from megatron_cca.models.weight_map import GroupedQueryQKV, OneToOne, WeightMap
from tests.references.huggingface import SIZES

# Sizes of emu3-tiny, which has such keys only where they are set.
_COMMON = {**SIZES, "rope_theta": 1e6, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
# By name: transformers' model, what its configuration has besides, and the keys of the section ``model``.
MODELS = {
    "wide heads": ("Llama", {"head_dim": 24}, {"kv_channels": 24}),
    "norms of heads": ("Qwen3", {"head_dim": 24}, {"kv_channels": 24, "qk_layernorm": True}),
    "biases": ("Qwen2", {}, {"add_qkv_bias": True}),
    "biases of wide heads": ("Qwen2", {"head_dim": 24}, {"kv_channels": 24, "add_qkv_bias": True}),
}


def overrides_of(name: str) -> list[str]:
    """The keys of a run with such a model."""
    return [f"model.{key}={str(value).lower()}" for key, value in MODELS[name][2].items()]


def random_decoder(name: str, seed: int = 0):
    """A random model, float32. Norms are no ones and biases no zeros, so that a mix-up shows."""
    import transformers

    kind, more, _ = MODELS[name]
    settings = {**_COMMON, **more}
    # Emu3's pad is a word as any other here.
    settings["pad_token_id"] = None
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**settings))
    for own, parameter in model.named_parameters():
        if "norm" in own:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
        elif own.endswith(".bias"):
            torch.nn.init.normal_(parameter, 0.0, 0.3)
    return model.eval()


class DecoderFormat(Emu3HuggingFace):
    """The files of one of :data:`MODELS`, under the names that Emu3's have, too."""

    namings = (Naming("original", Emu3HuggingFace.namings[0].prefixes),)

    def __init__(self, name: str) -> None:
        kind, _, self.keys = MODELS[name]
        self.model_types = frozenset({kind.lower()})
        self.weights = weight_map(name)

    def read_model_config(self, config):
        """The sizes of emu3-tiny, and the attention's own."""
        return ModelConfig(name="emu3-tiny", **self.keys)

    def write_config(self, template, architecture, dtype, form):
        """The template as it is."""
        return copy.deepcopy(template)


def weight_map(name: str) -> WeightMap:
    """The weight map of one of :data:`MODELS`."""
    keys = MODELS[name][2]
    theirs, ours = "model.layers.{layer}.self_attn.", "decoder.layers.self_attention."
    more = []
    if "qk_layernorm" in keys:
        more += [OneToOne(f"{ours}{own}_layernorm.weight", f"{theirs}{own}_norm.weight", ("channels",)) for own in "qk"]
    if "add_qkv_bias" in keys:
        names = {part: f"{theirs}{part[0]}_proj.bias" for part in ("query", "key", "value")}
        more.append(GroupedQueryQKV(f"{ours}linear_qkv.bias", **names, are_biases=True))
    rules = [*EMU3_WEIGHTS.rules[:3], *more, *EMU3_WEIGHTS.rules[3:]]
    return WeightMap(rules, attention_options=tuple(keys))


def stand_in(monkeypatch, name: str) -> None:
    """Let Emu3's files be those of one of :data:`MODELS`."""
    monkeypatch.setitem(vars(FAMILIES["emu3"]), "huggingface", DecoderFormat(name))


def save_decoder(folder: Path, name: str, seed: int = 0):
    """Save a random model as transformers does; returns the model."""
    model = random_decoder(name, seed)
    model.save_pretrained(folder)
    return model


def in_megatron(name: str, architecture, tensors, padded: int) -> dict[str, torch.Tensor]:
    """Whole tensors under Megatron's names, layers apart, by the weight map. Rows that pad the vocabulary are zeros."""
    whole = {}
    for tensor in weight_map(name).tensors(architecture):
        rows = torch.cat([tensors[part.name][part.start : part.start + part.count] for part in tensor.parts])
        if tensor.padded:
            rows = torch.nn.functional.pad(rows, (0, 0, 0, padded - len(rows)))
        key = tensor.key
        if tensor.layer is not None:
            key = key.replace("decoder.layers.", f"decoder.layers.{tensor.layer}.")
        whole[key] = rows
    return whole
