"""The picture that the codes of a pyramid stand for, so far: features by a frozen codebook and frozen convolutions.

They belong to the image tokenizer (FoundationVision/VAR, ``quant.py``). The model's inputs are made of them, too. A
scale's code vectors are enlarged to the size of the last scale, pass a convolution, and are added up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv2d, interpolate

# Shared by all scales, in the released tokenizer.
NUM_CONVOLUTIONS = 4
_CONVOLVED = 0.5


class ScaleFeatures(torch.nn.Module):
    """Codebook and convolutions in fp32, whatever the precision of the model. They are never trained."""

    def __init__(self, codebook_size: int, channels: int, scales: tuple[int, ...]) -> None:
        super().__init__()
        self.scales = scales

        shapes = {
            "codebook": (codebook_size, channels),
            "convolutions": (NUM_CONVOLUTIONS, channels, channels, 3, 3),
            "convolution_biases": (NUM_CONVOLUTIONS, channels),
        }
        # Buffers, so that no optimizer and no requires_grad_ of the whole model reaches them.
        for name, shape in shapes.items():
            self.register_buffer(name, torch.empty(*shape, dtype=torch.float32))

    def forward(self, codes: Tensor) -> Tensor:
        """Return the picture so far at the size of each scale but the first, float32.

        Args:
            codes: int64 ``[B, N]``, whole scales from the first on. Codes of the last scale and of parts of a scale
                are not looked at.

        Returns:
            ``[B, N - 1 + ..., channels]``: one row for each position of the scales after the first, as far as codes
            reach.
        """
        total, rows = 0, []
        for added, side in zip(self.added_by_scales(codes), self.scales[1:], strict=False):
            total = total + added
            rows.append(self.at_size(total, side).flatten(2).transpose(1, 2))
        return torch.cat(rows, 1) if rows else self.codebook.new_empty(len(codes), 0, self.codebook.size(1))

    def added_by_scales(self, codes: Tensor) -> Iterator[Tensor]:
        """Yield what each whole scale of the codes adds to the picture, float32 ``[B, channels, side, side]``."""
        start = 0
        for number, side in enumerate(self.scales):
            if start + side**2 > codes.size(1):
                return
            yield self.added(codes[:, start : start + side**2], number)
            start += side**2

    def added(self, codes: Tensor, number: int) -> Tensor:
        """Return what one scale adds to the picture.

        Args:
            codes: int64 ``[B, side * side]``.
            number: of the scale, from 0 on.
        """
        side, last = self.scales[number], self.scales[-1]
        maps = self.codebook[codes].transpose(1, 2).unflatten(2, (side, side))
        if side != last:
            maps = interpolate(maps, size=(last, last), mode="bicubic")
        which = convolution_of_scale(number, len(self.scales))
        convolved = conv2d(maps, self.convolutions[which], self.convolution_biases[which], padding=1)
        return (1 - _CONVOLVED) * maps + _CONVOLVED * convolved

    @staticmethod
    def at_size(picture: Tensor, side: int) -> Tensor:
        """Return a picture ``[B, channels, last, last]`` at the size of a scale, ``[B, channels, side, side]``."""
        return interpolate(picture, size=(side, side), mode="area")

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> ScaleFeatures:
        # The authors compute the inputs in fp32. Casting the model to bf16 must not change them.
        def moved(tensor: Tensor) -> Tensor:
            result = function(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(moved, recurse)


def convolution_of_scale(number: int, num_scales: int) -> int:
    """Return the number of a scale's convolution: the nearest of places that are spread over the scales.

    Some scales lie half way between two. Rounding decides, as in the authors' ``PhiPartiallyShared``.
    """
    margin = 1 / 3 / NUM_CONVOLUTIONS
    places = np.linspace(margin, 1 - margin, NUM_CONVOLUTIONS)
    return int(np.argmin(np.abs(places - number / max(num_scales - 1, 1))))
