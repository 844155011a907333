"""Quantise maps of vectors scale by scale, as VAR's image tokenizer does (FoundationVision/VAR, ``quant.py``)."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_cca.errors import UserError
from megatron_cca.models.formats import check_codes, check_pixels
from megatron_cca.models.pyramid import num_codes
from megatron_cca.models.scale_features import ScaleFeatures

# Places that are compared with the whole codebook at a time: 0.1 GB in float64 for 4,096 codes.
_PLACES_AT_ONCE = 4096


@torch.no_grad()
def quantized(features: ScaleFeatures, maps: Tensor) -> Tensor:
    """Return the codes int64 ``[N, codes]`` of maps ``[N, D, s, s]``: each scale takes what smaller ones leave."""
    rest, codes = maps.clone(), []
    for number in range(len(features.scales)):
        codes.append(quantized_scale(features, rest, number))
        rest -= features.added(codes[-1], number)
    return torch.cat(codes, 1)


def quantized_scale(features: ScaleFeatures, rest: Tensor, number: int) -> Tensor:
    """Return the codes int64 ``[N, side * side]`` of one scale, for what smaller scales leave, ``[N, D, s, s]``."""
    places = features.at_size(rest, features.scales[number]).flatten(2).transpose(1, 2)
    return _nearest(features.codebook, places.flatten(0, 1)).view(places.shape[:2])


def _nearest(codebook: Tensor, vectors: Tensor) -> Tensor:
    """Return the codes int64 ``[M]`` at the smallest distance to vectors ``[M, D]``. Ties go to the first.

    The comparison is in float64. In the authors' float32, rounding decides between near neighbours.
    """
    # Not by a matrix product, which rounds equal columns differently, depending on their place.
    exactly = "donot_use_mm_for_euclid_dist"
    parts = vectors.double().split(_PLACES_AT_ONCE)
    return torch.cat([torch.cdist(part, codebook.double(), compute_mode=exactly).argmin(-1) for part in parts])


def check_pyramid_pixels(pixels: Tensor, side: int) -> None:
    """Check that pixels are images of one side, uint8 ``[N, side, side, 3]``.

    Raises:
        UserError: dtype, shape or a side is wrong.
    """
    check_pixels(pixels, 1, 0)
    if pixels.shape[1:3] != (side, side):
        height, width = pixels.shape[1:3]
        raise UserError(f"pixels: {height} x {width}; this tokenizer takes {side} x {side} alone")


def check_pyramid_codes(codes: Tensor, codebook_size: int, scales: tuple[int, ...]) -> None:
    """Check that codes are those of whole images, int64 ``[N, 1, codes]``, and are in the codebook.

    Raises:
        UserError: dtype or shape is wrong, a code is not in the codebook, or an image has more or fewer codes.
    """
    check_codes(codes, codebook_size, 0)
    if codes.shape[1:] != (1, num_codes(scales)):
        sides = ", ".join(str(side) for side in scales)
        raise UserError(
            f"codes: {list(codes.shape[1:])} for an image; scales of side {sides} have [1, {num_codes(scales)}]"
        )
