"""VQGAN's network (arXiv 2012.09841), of which several families' image tokenizers are made, and how it is run.

Attention is only at the lowest resolution. Modules and tensors have the names of LlamaGen's authors
(FoundationVision/LlamaGen, ``vq_model.py``). It is for inference alone, without dropout and losses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_cca.models.formats import check_pixels, full_float32

# VQGAN's number of groups. Channels must be a multiple of it.
NORM_GROUPS = 32
_NORM_EPSILON = 1e-6
# Pixels that pass through the network together: 7 images of 384 x 384 or 16 of 256 x 256. VQ-16 takes 2.6 GB for them.
_PIXELS_AT_ONCE = 2**20


@dataclass(frozen=True)
class VqSizes:
    """The sizes of a network.

    LlamaGen's VQ-16 has 128; 128, 128, 256, 256, 512; 2; 256; 16,384; 8. VQ-8 has one level of 128 fewer. VAR's has
    160; 160, 160, 320, 320, 640; 2; 32; 4,096; 32.

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


class VqNetwork(nn.Module):
    """The network that encodes pixels to vectors and decodes vectors to pixels, see :class:`VqSizes`.

    Args:
        sizes: of the network.
        quant_kernel: side of the kernels of the two convolutions beside the codebook.
    """

    def __init__(self, sizes: VqSizes, quant_kernel: int = 1) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(sizes), Decoder(sizes)
        inner, outer, padding = sizes.embed_dim, sizes.latent_channels, quant_kernel // 2
        self.quant_conv = nn.Conv2d(outer, inner, quant_kernel, padding=padding)
        self.post_quant_conv = nn.Conv2d(inner, outer, quant_kernel, padding=padding)

    def vectors(self, pixels: Tensor) -> Tensor:
        """Encode pixels ``[N, 3, H, W]`` between -1 and 1 to vectors ``[N, D, H / f, W / f]`` of any length."""
        return self.quant_conv(self.encoder(pixels))

    def pixels(self, vectors: Tensor) -> Tensor:
        """Decode vectors ``[N, D, h, w]`` to pixels ``[N, 3, h f, w f]``, about -1 to 1."""
        return self.decoder(self.post_quant_conv(vectors))


class VqTokenizer:
    """What image tokenizers of this network have in common. A subclass says how vectors and codes belong together.

    Everything runs in full float32, and batches in parts of bounded size.

    Args:
        network: on its device.
        sizes: of the network.
        fingerprint: of everything that the meaning of codes depends on.
    """

    temporal_factor = 0
    scales: tuple[int, ...] = ()

    def __init__(self, network: VqNetwork, sizes: VqSizes, fingerprint: str) -> None:
        self._network = network.eval().requires_grad_(False)
        self.spatial_factor, self.codebook_size = sizes.spatial_factor, sizes.codebook_size
        self._embed_dim, self._fingerprint = sizes.embed_dim, fingerprint
        self._device = next(network.parameters()).device

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> Tensor:
        """Encode images uint8 ``[N, H, W, 3]`` to the vectors that are quantised, float32 ``[N, D, H / f, W / f]``.

        Raises:
            UserError: pixels of another dtype or shape, or sides that the factor does not divide.
        """
        check_pixels(pixels, self.spatial_factor, self.temporal_factor)
        number, height, width, _ = pixels.shape
        shape = number, self._embed_dim, height // self.spatial_factor, width // self.spatial_factor
        found = torch.empty(shape, device=self._device)
        with full_float32(self._device.type):
            for part in self._parts(number, height * width):
                planes = pixels[part].to(self._device).movedim(-1, 1).contiguous()
                found[part] = self._network.vectors((planes.float() / 255 - 0.5) / 0.5)
        return found

    def fingerprint(self) -> str:
        """Return a short hash of weights and sizes. It is the same for every form of the file and every device."""
        return self._fingerprint

    @torch.no_grad()
    def _decoded(self, codes: Tensor, height: int, width: int, look_up: Callable[[Tensor], Tensor]) -> Tensor:
        """Decode codes ``[N, ...]`` to float32 ``[N, height, width, 3]``, about -1 to 1, on the network's device.

        Args:
            codes: which were checked.
            height, width: of the images.
            look_up: returns the vectors ``[M, D, height / f, width / f]`` of some of the codes.
        """
        found = torch.empty((len(codes), height, width, 3), device=self._device)
        with full_float32(self._device.type):
            for part in self._parts(len(codes), height * width):
                found[part] = self._network.pixels(look_up(codes[part].to(self._device))).movedim(1, -1)
        return found

    def _parts(self, number: int, pixels: int) -> list[slice]:
        at_once = max(1, _PIXELS_AT_ONCE // pixels)
        return [slice(start, start + at_once) for start in range(0, number, at_once)]


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
