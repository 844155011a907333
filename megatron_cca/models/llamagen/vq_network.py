"""The network of LlamaGen's image tokenizer (arXiv 2406.06525; FoundationVision/LlamaGen, ``vq_model.py``).

It is VQGAN's network (arXiv 2012.09841) with attention only at the lowest resolution, and a codebook of unit vectors.
Modules and tensors have the authors' names, so that their files load as they are. It is for inference alone, without
dropout and losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest

import torch
from torch import Tensor, nn
from torch.nn import functional

# VQGAN's number of groups. Channels must be a multiple of it.
NORM_GROUPS = 32
_NORM_EPSILON = 1e-6
# Cosines that differ by less are equal up to rounding in float64.
_EQUAL = 1e-12


@dataclass(frozen=True)
class VqSizes:
    """The sizes of a network.

    The authors' VQ-16 has 128; 128, 128, 256, 256, 512; 2; 256; 16,384; 8. VQ-8 has one level of 128 fewer.

    Attributes:
        first_channels: of the convolution that sees the pixels.
        channels: of each level, from the highest resolution down. Each level has half the resolution of the one before.
        num_res_blocks: at each level. The decoder has one more.
        latent_channels: between encoder and codebook.
        codebook_size: codes are below it.
        embed_dim: of the codebook's vectors.
    """

    first_channels: int
    channels: tuple[int, ...]
    num_res_blocks: int
    latent_channels: int
    codebook_size: int
    embed_dim: int

    @property
    def spatial_factor(self) -> int:
        """Pixels per code along a side."""
        return 2 ** (len(self.channels) - 1)


def network_on_meta(sizes: VqSizes) -> VqNetwork:
    """Build the network on the meta device, without weights of whatever size."""
    with torch.device("meta"):
        return VqNetwork(sizes)


class VqNetwork(nn.Module):
    """The network that encodes pixels to vectors and decodes codes to pixels, see :class:`VqSizes`."""

    def __init__(self, sizes: VqSizes) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(sizes), Decoder(sizes)
        self.quantize = Codebook(sizes)
        self.quant_conv = nn.Conv2d(sizes.latent_channels, sizes.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(sizes.embed_dim, sizes.latent_channels, 1)

    def vectors(self, pixels: Tensor) -> Tensor:
        """Encode pixels ``[N, 3, H, W]`` between -1 and 1 to vectors ``[N, D, H / f, W / f]`` of any length."""
        return self.quant_conv(self.encoder(pixels))

    def pixels(self, codes: Tensor) -> Tensor:
        """Decode codes int64 ``[N, h, w]`` to pixels ``[N, 3, h f, w f]``, about -1 to 1."""
        return self.decoder(self.post_quant_conv(self.quantize.unit_vectors()[codes].movedim(-1, 1)))


class Codebook(nn.Module):
    """Vectors that are compared by their direction."""

    def __init__(self, sizes: VqSizes) -> None:
        super().__init__()
        self.embedding = nn.Embedding(sizes.codebook_size, sizes.embed_dim)

    def unit_vectors(self) -> Tensor:
        """Return the vectors with unit length, ``[K, D]``."""
        return functional.normalize(self.embedding.weight, dim=-1)

    def nearest(self, vectors: Tensor) -> Tensor:
        """Return the codes int64 ``[M]`` with the nearest direction to vectors ``[M, D]``. Ties go to the first.

        The comparison is in float64. In the authors' float32, rounding decides between near neighbours.
        """
        directions = functional.normalize(self.embedding.weight.double(), dim=-1)
        cosines = functional.normalize(vectors.double(), dim=-1) @ directions.T
        # A matrix product rounds equal columns differently, depending on their place.
        best = cosines.amax(-1, keepdim=True) - _EQUAL
        return (cosines >= best).byte().argmax(-1)


class Encoder(nn.Module):
    """The encoder, from ``[N, 3, H, W]`` to ``[N, Z, H / f, W / f]``."""

    def __init__(self, sizes: VqSizes) -> None:
        super().__init__()
        last = sizes.channels[-1]
        self.conv_in = nn.Conv2d(3, sizes.first_channels, 3, padding=1)
        widths, bottom = [sizes.first_channels, *sizes.channels], len(sizes.channels) - 1
        self.conv_blocks = nn.ModuleList(
            Level(
                before,
                width,
                sizes.num_res_blocks,
                attends=place == bottom,
                downsample=Downsample(width) if place < bottom else None,
            )
            for place, (before, width) in enumerate(pairwise(widths))
        )
        self.mid = _middle(last)
        self.norm_out = _norm(last)
        self.conv_out = nn.Conv2d(last, sizes.latent_channels, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        """See the class."""
        return _run(self, [*self.conv_blocks, *self.mid], pixels)


class Decoder(nn.Module):
    """The decoder, from ``[N, Z, h, w]`` to ``[N, 3, h f, w f]``."""

    def __init__(self, sizes: VqSizes) -> None:
        super().__init__()
        first, last = sizes.channels[-1], sizes.channels[0]
        self.conv_in = nn.Conv2d(sizes.latent_channels, first, 3, padding=1)
        self.mid = _middle(first)
        widths, top = [first, *reversed(sizes.channels)], len(sizes.channels) - 1
        self.conv_blocks = nn.ModuleList(
            Level(
                before,
                width,
                sizes.num_res_blocks + 1,
                attends=place == 0,
                upsample=Upsample(width) if place < top else None,
            )
            for place, (before, width) in enumerate(pairwise(widths))
        )
        self.norm_out = _norm(last)
        self.conv_out = nn.Conv2d(last, 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """See the class."""
        return _run(self, [*self.mid, *self.conv_blocks], latents)


class Level(nn.Module):
    """Residual blocks of one resolution, optionally with attention after each, then a change of resolution."""

    def __init__(
        self,
        before: int,
        channels: int,
        num_blocks: int,
        *,
        attends: bool,
        downsample: nn.Module | None = None,
        upsample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        inputs = [before] + [channels] * (num_blocks - 1)
        self.res = nn.ModuleList(ResidualBlock(width, channels) for width in inputs)
        self.attn = nn.ModuleList(Attention(channels) for _ in inputs if attends)
        self.downsample, self.upsample = downsample, upsample

    def forward(self, hidden: Tensor) -> Tensor:
        """Return ``[N, C', H', W']`` for ``[N, C, H, W]``."""
        for residual, attention in zip_longest(self.res, self.attn):
            hidden = residual(hidden)
            hidden = hidden if attention is None else attention(hidden)
        resample = self.downsample or self.upsample
        return hidden if resample is None else resample(hidden)


class ResidualBlock(nn.Module):
    """A residual block, from ``[N, C, H, W]`` to ``[N, C', H, W]``."""

    def __init__(self, before: int, channels: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(before), nn.Conv2d(before, channels, 3, padding=1)
        self.norm2, self.conv2 = _norm(channels), nn.Conv2d(channels, channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(before, channels, 1) if before != channels else None

    def forward(self, given: Tensor) -> Tensor:
        """See the class."""
        hidden = self.conv1(_activated(self.norm1(given)))
        hidden = self.conv2(_activated(self.norm2(hidden)))
        return hidden.add_(given if self.nin_shortcut is None else self.nin_shortcut(given))


class Attention(nn.Module):
    """One head over all places of an image."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, given: Tensor) -> Tensor:
        """Return the attention of ``[N, C, h, w]``, in the same shape."""
        normed = self.norm(given)
        query, key, value = (part(normed).flatten(2) for part in (self.q, self.k, self.v))
        # Plain matrix products, whose precision can be set. Fused kernels choose TF32 by themselves.
        weights = (query.transpose(1, 2) @ key * given.shape[1] ** -0.5).softmax(-1)
        return given + self.proj_out((value @ weights.transpose(1, 2)).view_as(given))


class Downsample(nn.Module):
    """A convolution that halves the resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return ``[N, C, H / 2, W / 2]`` for ``[N, C, H, W]``. Zeros are padded only on the right and below."""
        return self.conv(functional.pad(hidden, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """A convolution after doubling the resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return ``[N, C, 2 H, 2 W]`` for ``[N, C, H, W]``."""
        return self.conv(functional.interpolate(hidden, scale_factor=2.0, mode="nearest"))


def _middle(channels: int) -> nn.ModuleList:
    return nn.ModuleList([ResidualBlock(channels, channels), Attention(channels), ResidualBlock(channels, channels)])


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, channels, eps=_NORM_EPSILON)


def _activated(hidden: Tensor) -> Tensor:
    return functional.silu(hidden, inplace=True)


def _run(half: Encoder | Decoder, layers: Sequence[nn.Module], given: Tensor) -> Tensor:
    hidden = half.conv_in(given)
    for layer in layers:
        hidden = layer(hidden)
    return half.conv_out(_activated(half.norm_out(hidden)))
