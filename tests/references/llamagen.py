"""LlamaGen, class to image, and a CCA step in plain PyTorch: oracle for Megatron's model and the weights' names.

Written from the paper (arXiv 2406.06525, section 2 and table 2), CCA's (arXiv 2410.09347) and what both say publicly of
their training. Weights are a dict under the authors' names, in their shapes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import silu


@dataclass(frozen=True)
class Sizes:
    """Of one model. ``grid`` is the side of the square of codes; heads are keys' and values' heads, too."""

    layers: int
    width: int
    heads: int
    grid: int = 24
    codebook: int = 16_384
    classes: int = 1000
    ffn: int | None = None
    base: float = 10_000.0
    eps: float = 1e-5

    @property
    def tokens(self) -> int:
        """Codes of an image."""
        return self.grid**2

    @property
    def ffn_width(self) -> int:
        """Given, or 2/3 of 4 x the width in whole 256s, rounded up."""
        return self.ffn or (int(2 * (4 * self.width) / 3) + 255) // 256 * 256


PUBLISHED = {
    "B": Sizes(12, 768, 12),
    "L": Sizes(24, 1024, 16),
    "XL": Sizes(36, 1280, 20),
    "XXL": Sizes(48, 1536, 24),
    "3B": Sizes(24, 3200, 32),
}


def shapes(sizes):
    """The authors' names and shapes: in a layer wqkv is the queries of all heads, then the keys, then the values."""
    width, ffn = sizes.width, sizes.ffn_width
    answer = {
        # One class more than there are: the null class, last, stands for a dropped condition.
        "cls_embedding.embedding_table.weight": (sizes.classes + 1, width),
        "tok_embeddings.weight": (sizes.codebook, width),
    }
    for layer in range(sizes.layers):
        parts = {
            "attention.wqkv.weight": (3 * width, width),
            "attention.wo.weight": (width, width),
            "feed_forward.w1.weight": (ffn, width),
            "feed_forward.w3.weight": (ffn, width),
            "feed_forward.w2.weight": (width, ffn),
            "attention_norm.weight": (width,),
            "ffn_norm.weight": (width,),
        }
        answer |= {f"layers.{layer}.{name}": shape for name, shape in parts.items()}
    return answer | {"norm.weight": (width,), "output.weight": (sizes.codebook, width)}


def num_parameters(sizes):
    return sum(torch.Size(shape).numel() for shape in shapes(sizes).values())


def random_weights(sizes, seed=0, std=0.05):
    """All of them drawn, the norms around 1: nothing that could hide a tensor in another's place."""
    generator = torch.Generator().manual_seed(seed)
    weights = {name: std * torch.randn(shape, generator=generator) for name, shape in shapes(sizes).items()}
    return {name: value + 1 if value.dim() == 1 else value for name, value in weights.items()}


def rms_norm(x, weight, eps):
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def rotation(sizes):
    """cos and sin of every place and pair of channels, ``[1 + grid * grid, D / 2]``; both are 0 at the class."""
    pairs = sizes.width // sizes.heads // 2
    by_axis = pairs // 2
    frequencies = sizes.base ** (-torch.arange(by_axis, dtype=torch.float64) / by_axis)
    cos, sin = torch.zeros(2, 1 + sizes.grid**2, pairs, dtype=torch.float64)
    for row in range(sizes.grid):
        for column in range(sizes.grid):
            angles = torch.cat([row * frequencies, column * frequencies])
            place = 1 + row * sizes.grid + column
            cos[place], sin[place] = angles.cos(), angles.sin()
    return cos, sin


def rotate(x, cos, sin):
    """Neighbouring channels are a pair; x is ``[B, S, heads, D]``."""
    cos, sin = (part[: x.size(1), None].to(x.dtype) for part in (cos, sin))
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def attention(x, wqkv, wo, sizes):
    batch, length, width = x.shape
    query, key, value = (part.view(batch, length, sizes.heads, -1) for part in (x @ wqkv.t()).split(width, -1))
    cos, sin = rotation(sizes)
    query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    scores = torch.einsum("bshd,bthd->bhst", query, key) / query.size(-1) ** 0.5
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    return torch.einsum("bhst,bthd->bshd", weights, value).flatten(2) @ wo.t()


def logits(weights, classes, codes, sizes):
    """Of the next code after the class and after each code: ``[B, 1 + S, codebook]`` of ints ``[B]`` and ``[B, S]``."""
    table = weights["cls_embedding.embedding_table.weight"]
    x = torch.cat([table[classes][:, None], weights["tok_embeddings.weight"][codes]], 1)
    for layer in range(sizes.layers):
        prefix = f"layers.{layer}."
        w = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        normed = rms_norm(x, w["attention_norm.weight"], sizes.eps)
        x = x + attention(normed, w["attention.wqkv.weight"], w["attention.wo.weight"], sizes)
        normed = rms_norm(x, w["ffn_norm.weight"], sizes.eps)
        gate, up = normed @ w["feed_forward.w1.weight"].t(), normed @ w["feed_forward.w3.weight"].t()
        x = x + (silu(gate) * up) @ w["feed_forward.w2.weight"].t()
    return rms_norm(x, weights["norm.weight"], sizes.eps) @ weights["output.weight"].t()
