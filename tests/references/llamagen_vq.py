"""LlamaGen's image tokenizer once more, as plain functions of a dictionary of tensors, in float64.

Written from taming-transformers' VQGAN (arXiv 2012.09841) and what LlamaGen's paper (arXiv 2406.06525) changes of it:
attention at the lowest resolution only, a codebook of unit vectors. Nothing here is shared with the package.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

Tensors = Mapping[str, Tensor]

# Channels of the first convolution and of each level, residual blocks, latent channels, codebook.
TINY = {"first": 32, "widths": (32, 64, 96), "blocks": 1, "latent": 48, "codebook": (40, 4)}
VQ_16 = {"first": 128, "widths": (128, 128, 256, 256, 512), "blocks": 2, "latent": 256, "codebook": (16_384, 8)}
VQ_8 = VQ_16 | {"widths": (128, 256, 256, 512)}


def shapes(first: int, widths: tuple[int, ...], blocks: int, latent: int, codebook: tuple[int, int]) -> dict:
    """Every tensor's name and shape, as the authors' modules have them."""
    found: dict[str, tuple[int, ...]] = {}

    def conv(name: str, into: int, out: int, kernel: int) -> None:
        found.update({f"{name}.weight": (out, into, kernel, kernel), f"{name}.bias": (out,)})

    def norm(name: str, channels: int) -> None:
        found.update({f"{name}.weight": (channels,), f"{name}.bias": (channels,)})

    def residual(name: str, into: int, out: int) -> None:
        norm(f"{name}.norm1", into)
        conv(f"{name}.conv1", into, out, 3)
        norm(f"{name}.norm2", out)
        conv(f"{name}.conv2", out, out, 3)
        if into != out:
            conv(f"{name}.nin_shortcut", into, out, 1)

    def attention(name: str, channels: int) -> None:
        norm(f"{name}.norm", channels)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", channels, channels, 1)

    def middle(half: str) -> None:
        residual(f"{half}.mid.0", widths[-1], widths[-1])
        attention(f"{half}.mid.1", widths[-1])
        residual(f"{half}.mid.2", widths[-1], widths[-1])

    def levels(half: str, order: list[int], start: int, count: int, resample: str) -> int:
        for place, level in enumerate(order):
            for block in range(count):
                residual(f"{half}.conv_blocks.{place}.res.{block}", start, widths[level])
                start = widths[level]
                if level == len(widths) - 1:
                    attention(f"{half}.conv_blocks.{place}.attn.{block}", start)
            if place < len(order) - 1:
                conv(f"{half}.conv_blocks.{place}.{resample}.conv", start, start, 3)
        return start

    conv("encoder.conv_in", 3, first, 3)
    last = levels("encoder", [*range(len(widths))], first, blocks, "downsample")
    middle("encoder")
    norm("encoder.norm_out", last)
    conv("encoder.conv_out", last, latent, 3)
    conv("decoder.conv_in", latent, widths[-1], 3)
    middle("decoder")
    last = levels("decoder", [*reversed(range(len(widths)))], widths[-1], blocks + 1, "upsample")
    norm("decoder.norm_out", last)
    conv("decoder.conv_out", last, 3, 3)
    conv("quant_conv", latent, codebook[1], 1)
    conv("post_quant_conv", codebook[1], latent, 1)
    return found | {"quantize.embedding.weight": codebook}


def random_vq(sizes: Mapping = TINY, seed: int = 0) -> dict[str, Tensor]:
    """float32 tensors that keep activations near one, codes spread, and no bias, norm or shortcut idle."""
    return random_tensors(shapes(**sizes), seed)


def random_tensors(wanted: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """As random_vq, of any names and shapes of such a network."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in wanted.items():
        tensor = torch.randn(shape, generator=generator)
        if len(shape) == 4:
            tensor *= math.prod(shape[1:]) ** -0.5
        elif "norm" in name and name.endswith("weight"):
            tensor = 1 + 0.3 * tensor
        elif len(shape) == 1:
            tensor *= 0.2
        state[name] = tensor
    # Pixels of every level, some of them beyond black and white.
    state["decoder.conv_out.weight"] *= 0.6
    return state


def save_vq(state: Tensors, path: Path, **others: object) -> Path:
    """As the authors' training writes it: under "model", with the record of used codes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(saved({"model": dict(state) | {"quantize.codebook_used": torch.zeros(65_536)}} | others))
    return path


def saved(found: object) -> bytes:
    """What torch.save writes."""
    file = io.BytesIO()
    torch.save(found, file)
    return file.getvalue()


def encoded(state: Tensors, pixels: Tensor) -> Tensor:
    """uint8 ``[N, H, W, 3]`` -> int64 codes ``[N, h, w]``: the nearest unit vector of the codebook."""
    return nearest(state, latents(state, pixels))


def latents(state: Tensors, pixels: Tensor) -> Tensor:
    """uint8 ``[N, H, W, 3]`` -> float64 ``[N, D, h, w]``, before the codebook."""
    state = {name: tensor.double() for name, tensor in state.items()}
    hidden = _conv(state, "encoder.conv_in", pixels.double().permute(0, 3, 1, 2) / 127.5 - 1)
    hidden = _levels(state, "encoder", hidden, "downsample", _halved)
    hidden = _middle(state, "encoder", hidden)
    hidden = _conv(state, "encoder.conv_out", _silu(_norm(state, "encoder.norm_out", hidden)))
    return _conv(state, "quant_conv", hidden)


def nearest(state: Tensors, latent: Tensor) -> Tensor:
    """float64 ``[N, D, h, w]`` -> int64 ``[N, h, w]``, by the distance on the unit sphere; of equals the first."""
    vectors = latent.permute(0, 2, 3, 1).unsqueeze(3)
    codebook = state["quantize.embedding.weight"].double()
    vectors, codebook = (x / (x * x).sum(-1, keepdim=True).sqrt() for x in (vectors, codebook))
    return ((vectors - codebook) ** 2).sum(-1).argmin(-1)


def decoded(state: Tensors, codes: Tensor) -> Tensor:
    """int64 ``[N, h, w]`` -> float64 ``[N, H, W, 3]``, about -1 to 1."""
    codebook = state["quantize.embedding.weight"].double()
    return drawn(state, (codebook / codebook.norm(dim=1, keepdim=True))[codes].permute(0, 3, 1, 2))


def drawn(state: Tensors, hidden: Tensor) -> Tensor:
    """float64 vectors ``[N, D, h, w]`` -> float64 ``[N, H, W, 3]``, about -1 to 1."""
    state = {name: tensor.double() for name, tensor in state.items()}
    hidden = _conv(state, "decoder.conv_in", _conv(state, "post_quant_conv", hidden))
    hidden = _middle(state, "decoder", hidden)
    hidden = _levels(state, "decoder", hidden, "upsample", _doubled)
    hidden = _conv(state, "decoder.conv_out", _silu(_norm(state, "decoder.norm_out", hidden)))
    return hidden.permute(0, 2, 3, 1)


def _levels(state: Tensors, half: str, hidden: Tensor, resample: str, resized: Callable) -> Tensor:
    level = 0
    while f"{half}.conv_blocks.{level}.res.0.conv1.weight" in state:
        block = 0
        while f"{(name := f'{half}.conv_blocks.{level}.res.{block}')}.conv1.weight" in state:
            hidden = _residual(state, name, hidden)
            if f"{(name := name.replace('.res.', '.attn.'))}.q.weight" in state:
                hidden = _attention(state, name, hidden)
            block += 1
        if f"{(name := f'{half}.conv_blocks.{level}.{resample}.conv')}.weight" in state:
            hidden = resized(state, name, hidden)
        level += 1
    return hidden


def _middle(state: Tensors, half: str, hidden: Tensor) -> Tensor:
    hidden = _residual(state, f"{half}.mid.0", hidden)
    return _residual(state, f"{half}.mid.2", _attention(state, f"{half}.mid.1", hidden))


def _residual(state: Tensors, name: str, given: Tensor) -> Tensor:
    hidden = _conv(state, f"{name}.conv1", _silu(_norm(state, f"{name}.norm1", given)))
    hidden = _conv(state, f"{name}.conv2", _silu(_norm(state, f"{name}.norm2", hidden)))
    if f"{name}.nin_shortcut.weight" in state:
        given = _conv(state, f"{name}.nin_shortcut", given)
    return given + hidden


def _attention(state: Tensors, name: str, given: Tensor) -> Tensor:
    """One head over all positions."""
    normed = _norm(state, f"{name}.norm", given)
    query, key, value = (_conv(state, f"{name}.{part}", normed).flatten(2) for part in "qkv")
    scores = torch.einsum("nci,ncj->nij", query, key) / math.sqrt(query.shape[1])
    mixed = torch.einsum("nij,ncj->nci", scores.softmax(-1), value)
    return given + _conv(state, f"{name}.proj_out", mixed.reshape(given.shape))


def _norm(state: Tensors, name: str, hidden: Tensor) -> Tensor:
    """In 32 groups of channels."""
    groups = hidden.reshape(hidden.shape[0], 32, -1)
    centred = groups - groups.mean(-1, keepdim=True)
    normed = (centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()).reshape(hidden.shape)
    return normed * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]


def _halved(state: Tensors, name: str, hidden: Tensor) -> Tensor:
    """A row and a column of zeros after the last, then every second place."""
    padded = functional.pad(hidden, (0, 1, 0, 1))
    return functional.conv2d(padded, state[f"{name}.weight"], state[f"{name}.bias"], stride=2)


def _doubled(state: Tensors, name: str, hidden: Tensor) -> Tensor:
    return _conv(state, name, hidden.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))


def _conv(state: Tensors, name: str, hidden: Tensor) -> Tensor:
    weight = state[f"{name}.weight"]
    return functional.conv2d(hidden, weight, state[f"{name}.bias"], padding=weight.shape[-1] // 2)


def _silu(hidden: Tensor) -> Tensor:
    return hidden / (1 + torch.exp(-hidden))
