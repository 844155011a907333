"""Emu3.5's image tokenizer once more, as plain functions of a dictionary of tensors, in float64.

Written from the paper on its quantiser (arXiv 2412.02692). The network is that of ``llamagen_vq.py`` under the names of
VQGAN's authors. Nothing here is shared with the package.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from tests.references import llamagen_vq
from tests.references.var_vq import _MIDDLE

TINY = {"first": 32, "widths": (32, 32, 64), "blocks": 1, "latent": 48, "codebook": (60, 8)}
RELEASED = {
    "first": 256,
    "widths": (256, 256, 512, 512, 1024),
    "blocks": 4,
    "latent": 256,
    "codebook": (131_072, 256),
}
TABLE = "quantize.embedding.weight"


def own_name(name: str, levels: int) -> str:
    """The authors' name of one of llamagen_vq's tensors."""
    half, *parts = name.split(".")
    if half not in ("encoder", "decoder") or parts[0] not in ("conv_blocks", "mid"):
        return name
    if parts[0] == "mid":
        return ".".join([half, "mid", _MIDDLE[parts[1]], *parts[2:]])
    level = int(parts[1])
    place = ["down", str(level)] if half == "encoder" else ["up", str(levels - 1 - level)]
    return ".".join([half, *place, {"res": "block"}.get(parts[2], parts[2]), *parts[3:]])


def shapes(sizes: Mapping = TINY) -> dict[str, tuple[int, ...]]:
    """Every tensor's name and shape, as the authors' modules have them."""
    return {own_name(name, len(sizes["widths"])): shape for name, shape in llamagen_vq.shapes(**sizes).items()}


def random_ibq(sizes: Mapping = TINY, seed: int = 0) -> dict[str, Tensor]:
    """float32 tensors as llamagen_vq's."""
    return llamagen_vq.random_tensors(shapes(sizes), seed)


def flat_config(sizes: Mapping = TINY) -> dict:
    """What ``config.json`` beside the safetensors holds."""
    return {
        "architectures": ["Emu3p5VisionVQModel"],
        "model_type": "Emu3p5VisionVQ",
        **_network(sizes),
        "codebook_size": sizes["codebook"][0],
        "embed_dim": sizes["codebook"][1],
        "torch_dtype": "float32",
    }


def _network(sizes: Mapping) -> dict:
    levels = len(sizes["widths"])
    return {
        "double_z": False,
        "z_channels": sizes["latent"],
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": sizes["first"],
        "ch_mult": [width // sizes["first"] for width in sizes["widths"]],
        "num_res_blocks": sizes["blocks"],
        "attn_resolutions": [256 >> (levels - 1)],
        "dropout": 0.0,
    }


def save_json(state: Mapping[str, Tensor], folder: Path, sizes: Mapping = TINY, **changes) -> Path:
    """The form that transformers' ``AutoModel`` reads with the authors' own code."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(flat_config(sizes) | changes))
    save_file(dict(state), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def save_yaml(state: Mapping[str, Tensor], folder: Path, sizes: Mapping = TINY, **changes) -> Path:
    """The form that the authors' programs read."""
    folder.mkdir(parents=True, exist_ok=True)
    count, channels = sizes["codebook"]
    config = {"ddconfig": _network(sizes), "n_embed": count, "embed_dim": channels, "beta": 0.25}
    (folder / "config.yaml").write_text(yaml.safe_dump(config | changes))
    (folder / "model.ckpt").write_bytes(llamagen_vq.saved({"state_dict": dict(state)}))
    return folder


def latents(state: Mapping[str, Tensor], pixels: Tensor) -> Tensor:
    """uint8 ``[N, H, W, 3]`` -> float64 ``[N, D, h, w]``, before the codebook."""
    return llamagen_vq.latents(_plain(state), pixels)


def encoded(state: Mapping[str, Tensor], pixels: Tensor) -> Tensor:
    """uint8 ``[N, H, W, 3]`` -> int64 codes ``[N, h, w]``: the largest logit, of equals the first."""
    logits = torch.einsum("bdhw,nd->bhwn", latents(state, pixels), state[TABLE].double())
    return logits.argmax(-1)


def decoded(state: Mapping[str, Tensor], codes: Tensor) -> Tensor:
    """int64 ``[N, h, w]`` -> float64 ``[N, H, W, 3]``, about -1 to 1."""
    return llamagen_vq.drawn(_plain(state), state[TABLE].double()[codes].permute(0, 3, 1, 2))


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under llamagen_vq's names."""
    levels = sum(f"encoder.down.{level}.block.0.conv1.weight" in state for level in range(10))
    widths = tuple(state[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in range(levels))
    blocks = sum(f"encoder.down.0.block.{block}.conv1.weight" in state for block in range(10))
    first, latent = (state[f"encoder.{name}.weight"].shape[0] for name in ("conv_in", "conv_out"))
    names = llamagen_vq.shapes(first, widths, blocks, latent, tuple(state[TABLE].shape))
    return {name: state[own_name(name, levels)] for name in names}
