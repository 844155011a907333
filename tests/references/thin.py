"""Models as thin as can be, whose vocabularies are the published ones: not the digits', and quickly written."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_cca.models import resolve_architecture
from megatron_cca.models.emu3.weights import Emu3HuggingFace
from tests.references import llamagen

# Emu3's vocabulary and positions, spelled as baaivision's repository spells them.
EMU3 = {
    "architectures": ["Emu3ForCausalLM"],
    "model_type": "Emu3",
    "vocab_size": 184_622,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 9216,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
    "pad_token_id": 151_643,
    "bos_token_id": 151_849,
    "eos_token_id": 151_850,
    "tie_word_embeddings": False,
}
# 16,384 codes and 1,000 classes, 4 x 4 codes an image.
LLAMAGEN = llamagen.Sizes(2, 16, 2, grid=4, ffn=24)
LLAMAGEN_KEYS = {"num_attention_heads": 2, "max_position_embeddings": 17}


def emu3_weights(dtype=torch.bfloat16, **changed) -> dict[str, torch.Tensor]:
    """Random tensors under the original repository's names."""
    format = Emu3HuggingFace()
    architecture = resolve_architecture(format.read_model_config(EMU3 | changed))
    generator = torch.Generator().manual_seed(0)
    shapes = format.weights.huggingface_shapes(architecture)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def save_emu3(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **changed) -> Path:
    """A folder as from the hub: ``config.json``, safetensors, a tokenizer that nobody opens."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(EMU3 | changed))
    save_file(emu3_weights(**changed) if tensors is None else tensors, folder / "model.safetensors")
    (folder / "emu3.tiktoken").write_bytes(b"IQ== 0\nIg== 1\n")
    return folder
