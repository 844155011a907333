"""Emu3.5 on Hugging Face: Emu3's flat decoder with heads of their own width and a norm of each, and its tensors' names.

transformers has no class of that name. Its Qwen3 is the same decoder.
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_cca.config import ModelConfig
from megatron_cca.errors import UserError
from megatron_cca.models.architecture import Architecture
from megatron_cca.models.emu3.weights import EMU3_WEIGHTS, ORIGINAL_TYPE, Emu3HuggingFace, check_groups, is_emu3_5
from megatron_cca.models.emu3_5 import PRESETS
from megatron_cca.models.formats import Json
from megatron_cca.models.weight_map import OneToOne, WeightMap

_THEIRS, _OURS = "model.layers.{layer}.self_attn.", "decoder.layers.self_attention."

# Norms lie between the projections that they belong to and the attention's output, the fourth of Emu3's rules.
_PROJECTIONS = 3
EMU3_5_WEIGHTS = WeightMap(
    rules=[
        *EMU3_WEIGHTS.rules[:_PROJECTIONS],
        *(OneToOne(f"{_OURS}{one}_layernorm.weight", f"{_THEIRS}{one}_norm.weight", ("channels",)) for one in "qk"),
        *EMU3_WEIGHTS.rules[_PROJECTIONS:],
    ],
    attention_options=("kv_channels", "qk_layernorm"),
)


class Emu35HuggingFace(Emu3HuggingFace):
    """See :class:`megatron_cca.models.formats.HuggingFaceFormat`. There is one form, that of the authors."""

    weights = EMU3_5_WEIGHTS
    owner, presets, exported_type = "Emu3.5", PRESETS, ORIGINAL_TYPE
    size_keys: Mapping[str, str] = {**Emu3HuggingFace.size_keys, "kv_channels": "head_dim"}
    options: Mapping[str, bool] = {"qk_layernorm": True}
    namings = Emu3HuggingFace.namings[:1]

    def knows(self, config: Json) -> bool:
        """See :class:`HuggingFaceFormat`."""
        return is_emu3_5(config)

    def form(self, config: Json) -> str:
        """See :class:`HuggingFaceFormat`."""
        return self.namings[0].form

    def read_model_config(self, config: Json) -> ModelConfig:
        """See :class:`HuggingFaceFormat`. What a configuration leaves out is as in Emu3, whose class the authors use."""
        if "text_config" in config:
            raise UserError("text_config: Emu3.5 has one flat configuration; leave it out")
        return super().read_model_config(config)

    def write_config(self, template: Json | None, architecture: Architecture, dtype: str, form: str) -> Json:
        """See :class:`HuggingFaceFormat`."""
        config = super().write_config(template, architecture, dtype, form)
        # Without it nothing tells a model with another vocabulary from an Emu3.
        return config if template is not None else {**config, "head_dim": architecture.kv_channels}

    def _transformers_classes(self) -> tuple[type, type]:
        from transformers import Qwen3Config, Qwen3ForCausalLM

        return Qwen3Config, Qwen3ForCausalLM

    def _check_heads(self, text: Mapping, sizes: Mapping) -> None:
        check_groups(sizes)
