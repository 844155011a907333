"""Small random Emu3.5s on disk as their authors keep them, and their decoder in plain PyTorch.

Names and configuration are those of baaivision/Emu3.5 (``modeling_emu3.py``, ``configuration_emu3.py``). Written from
the papers of its parts: norms of heads (arXiv 2302.05442), rotary positions (arXiv 2104.09864).
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn.functional import silu

from tests.references.family import Oracle, leaves, tensors_in

# Of emu3_5-tiny.
CONFIG = {
    "architectures": ["Emu3ForCausalLM"],
    "attention_dropout": 0.1,
    "boi_token_id": 328,
    "bos_token_id": 324,
    "eof_token_id": 323,
    "eos_token_id": 325,
    "head_dim": 24,
    "hidden_act": "silu",
    "hidden_size": 64,
    "image_area": 518400,
    "intermediate_size": 176,
    "max_position_embeddings": 128,
    "model_type": "Emu3",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 320,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.48.2",
    "use_cache": True,
    "vocab_size": 457,
}


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor by its name."""
    hidden, ffn, size = (config[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    channels = config["head_dim"]
    query, key = (config[name] * channels for name in ("num_attention_heads", "num_key_value_heads"))
    found = {"model.embed_tokens.weight": (size, hidden), "model.norm.weight": (hidden,)}
    found["lm_head.weight"] = (size, hidden)
    for layer in range(config["num_hidden_layers"]):
        own = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (query, hidden),
            "self_attn.k_proj": (key, hidden),
            "self_attn.v_proj": (key, hidden),
            "self_attn.o_proj": (hidden, query),
            "self_attn.q_norm": (channels,),
            "self_attn.k_norm": (channels,),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (ffn, hidden),
            "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn),
        }
        found |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in own.items()}
    return found


def random_tensors(config: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """Float32. Norms are no ones, so that a mix-up shows."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) * (0.3 if len(shape) == 1 else 0.1) + (len(shape) == 1)
        for name, shape in shapes(config).items()
    }


def save(folder: Path, *, dtype=torch.float32, seed: int = 0, files: int = 1, **changes) -> dict[str, torch.Tensor]:
    """Save a random model in one or several files; return its tensors. ``changes`` are keys of the configuration."""
    config = {**CONFIG, "torch_dtype": str(dtype).removeprefix("torch."), **changes}
    tensors = {name: tensor.to(dtype) for name, tensor in random_tensors(config, seed).items()}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    names = sorted(tensors)
    parts = [names[start::files] for start in range(files)]
    places = {}
    for number, part in enumerate(parts, start=1):
        name = "model.safetensors" if files == 1 else f"model-{number:05d}-of-{files:05d}.safetensors"
        save_file({one: tensors[one] for one in part}, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(part, name)
    if files > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    for name in ("emu3.tiktoken", "emu3_vision_tokens.txt"):
        (folder / name).write_bytes(b"IQ== 0\nIg== 1\n")
    return tensors


def write(folder: Path, seed: int, dtype: torch.dtype) -> Path:
    """Save a random tiny model."""
    save(folder, seed=seed, dtype=dtype)
    return folder


def oracle(folder: Path) -> Oracle:
    """The plain decoder."""
    config, weights = json.loads((folder / "config.json").read_text()), leaves(tensors_in(folder))
    return Oracle(lambda tokens: logits(weights, tokens, config), weights)


def normed(x, weight, epsilon):
    """RMSNorm over the last dimension."""
    return x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt() * weight


def rotated(x, base):
    """``x`` is [B, heads, S, D]; the halves of a head are the parts of complex numbers."""
    half = x.size(-1) // 2
    speeds = base ** (-torch.arange(half, dtype=torch.float64) / half)
    turns = torch.polar(torch.ones(()).double(), torch.arange(x.size(-2)).double()[:, None] * speeds)
    turned = torch.complex(x[..., :half].double(), x[..., half:].double()) * turns
    return torch.cat([turned.real, turned.imag], -1).to(x.dtype)


def logits(tensors: dict, tokens: torch.Tensor, config: dict) -> torch.Tensor:
    """Next-token logits [B, S, V] of int64 tokens [B, S], in the dtype of the tensors."""
    epsilon, channels = config["rms_norm_eps"], config["head_dim"]
    x = tensors["model.embed_tokens.weight"][tokens]
    (batch, length), groups = tokens.shape, config["num_key_value_heads"]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    for layer in range(config["num_hidden_layers"]):

        def own(name, layer=layer):
            return tensors[f"model.layers.{layer}.{name}.weight"]

        def heads(name, given, own=own):
            return (given @ own(f"self_attn.{name}_proj").T).view(batch, length, -1, channels).transpose(1, 2)

        given = normed(x, own("input_layernorm"), epsilon)
        query, key = (
            rotated(normed(heads(one, given), own(f"self_attn.{one}_norm"), epsilon), config["rope_theta"])
            for one in "qk"
        )
        # Consecutive query heads share a key head.
        query = query.unflatten(1, (groups, -1))
        scores = (query @ key.unsqueeze(2).transpose(-1, -2) / channels**0.5).masked_fill(future, -torch.inf)
        mixed = (scores.softmax(-1) @ heads("v", given).unsqueeze(2)).flatten(1, 2)
        x = x + mixed.transpose(1, 2).flatten(2) @ own("self_attn.o_proj").T
        given = normed(x, own("post_attention_layernorm"), epsilon)
        gate, up = (given @ own(f"mlp.{one}_proj").T for one in ("gate", "up"))
        x = x + (silu(gate) * up) @ own("mlp.down_proj").T
    return normed(x, tensors["model.norm.weight"], epsilon) @ tensors["lm_head.weight"].T
