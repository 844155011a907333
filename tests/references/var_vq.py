"""VAR's image tokenizer once more, as plain functions of a dictionary of tensors, in float64.

Written from the paper (arXiv 2404.02905): VQGAN's network, whose picture of vectors is quantised scale by scale. The
network is that of ``llamagen_vq.py`` under other names. Nothing here is shared with the package.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from tests.references import llamagen_vq
from tests.references.var import RELEASED_SCALES, Sizes, codes_of, residuals
from tests.references.var import TINY as CODES

# As llamagen_vq's. The latent channels are the codebook's.
TINY = {
    "first": 32,
    "widths": (32, 64),
    "blocks": 1,
    "latent": CODES.channels,
    "codebook": (CODES.codebook, CODES.channels),
}
RELEASED = {"first": 160, "widths": (160, 160, 320, 320, 640), "blocks": 2, "latent": 32, "codebook": (4096, 32)}
_MIDDLE = {"0": "block_1", "1": "attn_1", "2": "block_2"}
_HITS = "quantize.ema_vocab_hit_SV"


def shapes(sizes: Mapping = TINY) -> dict[str, tuple[int, ...]]:
    """Every tensor's name and shape, as the authors' modules have them, but for the hits of codes."""
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in llamagen_vq.shapes(**sizes).items():
        own, part = _own_name(name, len(sizes["widths"]))
        if name.startswith(("quant_conv.weight", "post_quant_conv.weight")):
            shape = (*shape[:2], 3, 3)
        found[own] = shape if part is None else (3 * shape[0], *shape[1:])
    channels = sizes["codebook"][1]
    for phi in range(4):
        found[f"quantize.quant_resi.qresi_ls.{phi}.weight"] = (channels, channels, 3, 3)
        found[f"quantize.quant_resi.qresi_ls.{phi}.bias"] = (channels,)
    return found


def random_var_vq(sizes: Mapping = TINY, seed: int = 0, scales: int = 10) -> dict[str, Tensor]:
    """float32 tensors as llamagen_vq's, with the hits of so many scales."""
    hits = torch.rand(scales, sizes["codebook"][0], generator=torch.Generator().manual_seed(seed))
    return llamagen_vq.random_tensors(shapes(sizes), seed) | {_HITS: hits}


def save_var_vq(state: Mapping[str, Tensor], path: Path) -> Path:
    """As the authors' release is: the tensors alone."""
    file = io.BytesIO()
    torch.save(dict(state), file)
    path.write_bytes(file.getvalue())
    return path


def encoded(state: Mapping[str, Tensor], pixels: Tensor, scales: tuple[int, ...] = RELEASED_SCALES) -> Tensor:
    """uint8 ``[N, S, S, 3]`` -> int64 codes ``[N, 1, codes]``."""
    maps = llamagen_vq.latents(_network(state), pixels)
    return codes_of(_doubles(state), maps, _sizes(state, scales))[:, None]


def decoded(state: Mapping[str, Tensor], codes: Tensor, scales: tuple[int, ...] = RELEASED_SCALES) -> Tensor:
    """int64 ``[N, 1, codes]`` -> float64 ``[N, S, S, 3]``, about -1 to 1."""
    maps = sum(residuals(_doubles(state), codes[:, 0], _sizes(state, scales)))
    return llamagen_vq.drawn(_network(state), maps)


def levels(floats: Tensor) -> Tensor:
    """About -1 to 1 -> uint8: halves of what is added to 1, times 255, without the fraction."""
    return (255 * (floats.clamp(-1, 1) + 1) / 2).to(torch.uint8)


def _sizes(state: Mapping[str, Tensor], scales: tuple[int, ...]) -> Sizes:
    codebook, channels = state["quantize.embedding.weight"].shape
    return Sizes(0, 0, 1, scales, codebook, channels)


def _doubles(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in state.items()}


def _network(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The network's tensors under llamagen_vq's names, as far as the file has them."""
    levels = sum(f"encoder.down.{level}.block.0.conv1.weight" in state for level in range(10))
    widths = tuple(state[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in range(levels))
    blocks = sum(f"encoder.down.0.block.{block}.conv1.weight" in state for block in range(10))
    first, latent = (state[f"encoder.{name}.weight"].shape[0] for name in ("conv_in", "conv_out"))
    codebook = tuple(state["quantize.embedding.weight"].shape)
    found = {}
    for name in llamagen_vq.shapes(first, widths, blocks, latent, codebook):
        own, part = _own_name(name, levels)
        found[name] = state[own] if part is None else state[own].chunk(3)[part]
    return found


def _own_name(name: str, levels: int) -> tuple[str, int | None]:
    """The authors' name of one of llamagen_vq's tensors; of query, key and value also which third of it."""
    half, *parts = name.split(".")
    if half not in ("encoder", "decoder") or parts[0] not in ("conv_blocks", "mid"):
        return name, None
    if parts[0] == "mid":
        parts[1] = _MIDDLE[parts[1]]
    else:
        parts[0] = "down" if half == "encoder" else "up"
        parts[1] = parts[1] if half == "encoder" else str(levels - 1 - int(parts[1]))
        parts[2] = {"res": "block"}.get(parts[2], parts[2])
    third = "qkv".find(parts[-2]) if parts[-2] in ("q", "k", "v") else None
    if third is not None:
        parts[-2] = "qkv"
    return ".".join([half, *parts]), third
