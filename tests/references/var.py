"""VAR, class to image by next-scale prediction, and a CCA step in plain PyTorch: oracle for Megatron's model.

Written from the paper (arXiv 2404.02905), CCA's (arXiv 2410.09347), and what FoundationVision/VAR and thu-ml/CCA say
publicly of model, tokenizer and training. Weights are a dict under the authors' names, in their shapes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import conv2d, gelu, interpolate, layer_norm, normalize, silu

RELEASED_SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
LARGEST_LOG_SCALE = math.log(100)


@dataclass(frozen=True)
class Sizes:
    """Of one model. A head has ``width / heads`` channels; ``phis`` convolutions are shared by the scales."""

    layers: int
    width: int
    heads: int
    scales: tuple[int, ...] = RELEASED_SCALES
    codebook: int = 4096
    channels: int = 32
    classes: int = 1000
    phis: int = 4
    ffn_ratio: int = 4
    eps: float = 1e-6

    @property
    def tokens(self) -> int:
        """Codes of an image."""
        return sum(side**2 for side in self.scales)


PUBLISHED = {f"d{depth}": Sizes(depth, 64 * depth, depth) for depth in (16, 20, 24, 30)}
TINY = Sizes(3, 48, 4, scales=(1, 2, 4), codebook=256, channels=4, classes=10)


def shapes(sizes):
    """The authors' names and shapes of what is trained; in a layer, mat_qkv is all queries, all keys, all values."""
    width, ffn = sizes.width, sizes.ffn_ratio * sizes.width
    answer = {
        "pos_start": (1, sizes.scales[0] ** 2, width),
        "pos_1LC": (1, sizes.tokens, width),
        "word_embed.weight": (width, sizes.channels),
        "word_embed.bias": (width,),
        # The null class is the last one.
        "class_emb.weight": (sizes.classes + 1, width),
        "lvl_embed.weight": (len(sizes.scales), width),
    }
    for layer in range(sizes.layers):
        parts = {
            "attn.scale_mul_1H11": (1, sizes.heads, 1, 1),
            "attn.q_bias": (width,),
            "attn.v_bias": (width,),
            "attn.mat_qkv.weight": (3 * width, width),
            "attn.proj.weight": (width, width),
            "attn.proj.bias": (width,),
            "ffn.fc1.weight": (ffn, width),
            "ffn.fc1.bias": (ffn,),
            "ffn.fc2.weight": (width, ffn),
            "ffn.fc2.bias": (width,),
            "ada_lin.1.weight": (6 * width, width),
            "ada_lin.1.bias": (6 * width,),
        }
        answer |= {f"blocks.{layer}.{name}": shape for name, shape in parts.items()}
    return answer | {
        "head_nm.ada_lin.1.weight": (2 * width, width),
        "head_nm.ada_lin.1.bias": (2 * width,),
        "head.weight": (sizes.codebook, width),
        "head.bias": (sizes.codebook,),
    }


def buffers(sizes):
    """What the authors' files hold besides: the level of each token, the mask as numbers to add, a bias of zeros."""
    levels = torch.cat([torch.full((side**2,), level) for level, side in enumerate(sizes.scales)])
    later = levels[:, None] < levels[None]
    mask = torch.zeros(later.shape).masked_fill(later, -torch.inf)
    zeros = {f"blocks.{layer}.attn.zero_k_bias": torch.zeros(sizes.width) for layer in range(sizes.layers)}
    return {"lvl_1L": levels[None], "attn_bias_for_masking": mask[None, None], **zeros}


def num_parameters(sizes):
    return sum(torch.Size(shape).numel() for shape in shapes(sizes).values())


def random_weights(sizes, seed=0, std=0.05):
    """All of them drawn; the learned scales around log 4, as the authors begin."""
    generator = torch.Generator().manual_seed(seed)
    weights = {name: std * torch.randn(shape, generator=generator) for name, shape in shapes(sizes).items()}
    return {name: value + math.log(4) if "scale_mul" in name else value for name, value in weights.items()}


def random_quantizer(sizes, seed=1):
    """The part of the tokenizer that the model's inputs are made with: codebook and convolutions."""
    generator = torch.Generator().manual_seed(seed)
    answer = {"quantize.embedding.weight": torch.randn(sizes.codebook, sizes.channels, generator=generator)}
    for phi in range(sizes.phis):
        shape = (sizes.channels, sizes.channels, 3, 3)
        name = f"quantize.quant_resi.qresi_ls.{phi}"
        answer[f"{name}.weight"] = 0.2 * torch.randn(shape, generator=generator)
        answer[f"{name}.bias"] = 0.2 * torch.randn(sizes.channels, generator=generator)
    return answer


def phi_of_scale(scale, sizes):
    """The number of the convolution for a scale: the nearest of evenly spread places, in numpy's float64.

    Several scales of the released ten lie half way between two places. Only the authors' own arithmetic (``quant.py``)
    tells which convolution they were trained with.
    """
    margin = 1 / 3 / sizes.phis if sizes.phis == 4 else 1 / 2 / sizes.phis
    places = np.linspace(margin, 1 - margin, sizes.phis)
    return int(np.argmin(np.abs(places - scale / (len(sizes.scales) - 1))))


def residuals(quantizer, codes, sizes):
    """What each scale adds to the picture's features: ``[B, channels, side, side]`` of the last side, one by one."""
    side, start = sizes.scales[-1], 0
    for scale, own in enumerate(sizes.scales):
        taken = codes[:, start : start + own**2]
        start += own**2
        maps = quantizer["quantize.embedding.weight"][taken].transpose(1, 2).unflatten(2, (own, own))
        if own != side:
            maps = interpolate(maps, size=(side, side), mode="bicubic")
        name = f"quantize.quant_resi.qresi_ls.{phi_of_scale(scale, sizes)}"
        yield 0.5 * maps + 0.5 * conv2d(maps, quantizer[f"{name}.weight"], quantizer[f"{name}.bias"], padding=1)


def features(quantizer, codes, sizes):
    """The inputs of all scales but the first: ``[B, tokens - first, channels]`` of codes ``[B, tokens]``."""
    total, answer = 0, []
    following = sizes.scales[1:]
    for added, side in zip(residuals(quantizer, codes, sizes), following, strict=False):
        total = total + added
        answer.append(interpolate(total, size=(side, side), mode="area").flatten(2).transpose(1, 2))
    return torch.cat(answer, 1)


def codes_of(quantizer, maps, sizes):
    """Codes ``[B, tokens]`` of an encoder's features ``[B, channels, side, side]``: each scale takes the nearest."""
    book, rest, answer = quantizer["quantize.embedding.weight"], maps.clone(), []
    for scale, side in enumerate(sizes.scales):
        small = rest if side == sizes.scales[-1] else interpolate(rest, size=(side, side), mode="area")
        vectors = small.flatten(2).transpose(1, 2)
        # Not by a matrix product, which rounds equal columns differently on some machines.
        answer.append(torch.cdist(vectors, book[None], compute_mode="donot_use_mm_for_euclid_dist").argmin(-1))
        so_far = torch.cat(answer, 1)
        padding = torch.zeros(len(maps), sizes.tokens - so_far.size(1), dtype=torch.int64)
        added = list(residuals(quantizer, torch.cat([so_far, padding], 1), sizes))[scale]
        rest = rest - added
    return torch.cat(answer, 1)


def modulated(x, scale, shift, eps):
    return layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


def attention(x, w, mask, sizes):
    zeros = torch.zeros_like(w["attn.q_bias"])
    bias = torch.cat([w["attn.q_bias"], zeros, w["attn.v_bias"]])
    query, key, value = (
        part.unflatten(-1, (sizes.heads, -1)) for part in (x @ w["attn.mat_qkv.weight"].t() + bias).chunk(3, -1)
    )
    sharpness = w["attn.scale_mul_1H11"].clamp(max=LARGEST_LOG_SCALE).exp().view(sizes.heads, 1)
    scores = torch.einsum("bshd,bthd->bhst", sharpness * normalize(query, dim=-1), normalize(key, dim=-1))
    weights = (scores + mask).softmax(-1)
    return torch.einsum("bhst,bthd->bshd", weights, value).flatten(2) @ w["attn.proj.weight"].t() + w["attn.proj.bias"]


def logits(weights, quantizer, classes, codes, sizes):
    """Of every code given the class and the codes of smaller scales: ``[B, tokens, codebook]``.

    Args:
        weights, quantizer: of model and tokenizer.
        classes: int64 ``[B]``.
        codes: int64 ``[B, tokens]``, scale by scale; those of the last scale are not looked at.
        sizes: of the model.
    """
    condition = weights["class_emb.weight"][classes]
    first = condition[:, None] + weights["pos_start"]
    others = features(quantizer, codes, sizes) @ weights["word_embed.weight"].t() + weights["word_embed.bias"]
    held = buffers(sizes)
    x = torch.cat([first, others], 1) + weights["lvl_embed.weight"][held["lvl_1L"]] + weights["pos_1LC"]
    mask = held["attn_bias_for_masking"].to(x)
    for layer in range(sizes.layers):
        prefix = f"blocks.{layer}."
        w = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        six = (silu(condition) @ w["ada_lin.1.weight"].t() + w["ada_lin.1.bias"])[:, None].chunk(6, -1)
        gamma1, gamma2, scale1, scale2, shift1, shift2 = six
        x = x + gamma1 * attention(modulated(x, scale1, shift1, sizes.eps), w, mask, sizes)
        hidden = modulated(x, scale2, shift2, sizes.eps) @ w["ffn.fc1.weight"].t() + w["ffn.fc1.bias"]
        x = x + gamma2 * (gelu(hidden, approximate="tanh") @ w["ffn.fc2.weight"].t() + w["ffn.fc2.bias"])
    two = silu(condition) @ weights["head_nm.ada_lin.1.weight"].t() + weights["head_nm.ada_lin.1.bias"]
    scale, shift = two[:, None].chunk(2, -1)
    return modulated(x, scale, shift, sizes.eps) @ weights["head.weight"].t() + weights["head.bias"]
