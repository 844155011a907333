"""Small image tokenizers of Emu3 on disk, in each form. The original's names are written here backwards, by hand."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

SIZES = {
    "codebook_size": 48,
    "base_channels": 32,
    "channel_multiplier": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [1],
    "hidden_size": 64,
}

_ORIGINAL_CONFIG = {
    "architectures": ["Emu3VisionVQModel"],
    "auto_map": {"AutoModel": "modeling_emu3visionvq.Emu3VisionVQModel"},
    "model_type": "Emu3VisionVQ",
    "codebook_size": 48,
    "embed_dim": 4,
    "z_channels": 4,
    "double_z": False,
    "in_channels": 3,
    "out_channels": 3,
    "temporal_downsample_factor": 4,
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [1],
    "dropout": 0.0,
    "torch_dtype": "float32",
}


def small_vq(seed: int = 0):
    """transformers' model with norms and running statistics that are no ones and zeros."""
    from transformers import Emu3VQVAE, Emu3VQVAEConfig

    torch.manual_seed(seed)
    model = Emu3VQVAE(Emu3VQVAEConfig(**SIZES)).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2.0)
            elif name.endswith("running_mean") or ("norm" in name and tensor.is_floating_point()):
                tensor.normal_(0.0 if "mean" in name else 1.0, 0.3)
    return model


def original_name(name: str) -> str:
    """What the original repository calls a tensor of transformers'."""
    parts = [part for part in name.split(".") if part not in ("down_block", "up_block")]
    if "middle_block" in parts:
        parts[parts.index("middle_block")] = "mid"
    for place, part in enumerate(parts):
        if part == "attn_norm":
            parts[place : place + 1] = ["attn_1", "norm"]
        elif part == "attn_norms":
            parts[place : place + 2] = ["attn", parts[place + 1], "norm"]
        elif part in ("q_proj", "k_proj", "v_proj"):
            parts[place] = part[0]
        elif part == "out_proj":
            parts[place] = "proj_out"
    return ".".join(parts)


def original_tensors(model) -> dict[str, torch.Tensor]:
    """All tensors as the original has them: projections of the attention are 1 x 1 convolutions."""
    return {
        original_name(name): (tensor[:, :, None, None] if "_proj.weight" in name else tensor).clone()
        for name, tensor in model.state_dict().items()
    }


def save_original(model, folder: Path) -> Path:
    """As BAAI/Emu3-VisionTokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(original_tensors(model), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_ORIGINAL_CONFIG))
    processor = {"image_processor_type": "Emu3VisionVQImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def save_composite(model, folder: Path, prefix: str = "vqmodel.") -> Path:
    """As a sharded Emu3ForConditionalGeneration, of whose files only those of the image tokenizer are there."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{prefix}{name}": tensor.clone() for name, tensor in model.state_dict().items()}
    names = sorted(tensors)
    places = {"text_model.lm_head.weight": "model-00003-of-00003.safetensors"}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05d}-of-00003.safetensors"
        others = {"text_model.model.norm.weight": torch.ones(3)} if number == 1 else {}
        save_file({name: tensors[name] for name in part} | others, folder / file)
        places |= dict.fromkeys([*part, *others], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    config = {"model_type": "emu3", "vq_config": {"model_type": "emu3_vqgan", **SIZES}, "text_config": {}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
