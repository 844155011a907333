"""The size in pixels at which an image is tokenised: Emu3's rule, or the size of a model of one grid.

Emu3's rule has two steps (baaivision/Emu3). ``train/prepare_data.py`` scales to an area. The image processor then
rounds the sides to multiples of the tokenizer's factor and keeps the area between two bounds.
"""

from __future__ import annotations

import math
from numbers import Integral

from torch import Tensor

# Bounds and limit of the image processor.
MIN_PIXELS, MAX_PIXELS, MAX_ASPECT = 512 * 512, 1024 * 1024, 5


def target_size(height: int, width: int, area: int, factor: int) -> tuple[int, int]:
    """Return height and width at which an image is tokenised. They are multiples of ``factor``.

    The bounds never contradict ``area``: the lower bound is at most ``area``, and the upper one at least.

    Args:
        height, width: of the image, in pixels.
        area: the wanted height x width, in pixels. Emu3's own is 720 * 720.
        factor: pixels per visual token along a side.

    Raises:
        ValueError: an image that Emu3's own processor refuses after the scaling to ``area``, or a number that is not
            a positive integer. The message says why.
    """
    _check_positive(height=height, width=width, area=area, factor=factor)
    height, width = scaled_size(height, width, area)
    if min(height, width) < factor:
        raise ValueError(f"{height} x {width} pixels at an area of {area}: a side is below the {factor} of one token")
    aspect = max(height, width) / min(height, width)
    if aspect > MAX_ASPECT:
        shown = math.ceil(aspect * 100) / 100  # rounded up, so that the message never says 5
        raise ValueError(f"aspect ratio {shown} is beyond {MAX_ASPECT}, which Emu3's own processor refuses")
    return _rounded(height, width, factor, min(MIN_PIXELS, area), max(MAX_PIXELS, area))


def scaled_size(height: int, width: int, area: int) -> tuple[int, int]:
    """Return height and width at an area, before they are rounded to multiples. This is Emu3's first step.

    Args:
        height, width: of the image, in pixels.
        area: the wanted height x width, in pixels.
    """
    ratio = (area / (height * width)) ** 0.5
    return round(height * ratio), round(width * ratio)


def covering_size(height: int, width: int, crop_height: int, crop_width: int) -> tuple[int, int]:
    """Return the smallest height and width, with the image's aspect ratio, that cover a crop.

    Args:
        height, width: of the image, in pixels.
        crop_height, crop_width: of the crop, in pixels.
    """
    scale = max(crop_height / height, crop_width / width)
    return max(crop_height, round(height * scale)), max(crop_width, round(width * scale))


def centre(pixels: Tensor, height: int, width: int) -> Tensor:
    """Return the middle of an image ``[H, W, 3]``, as a copy."""
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width].contiguous()


def _rounded(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    # round() rounds halves to even numbers, as in Emu3: 67.5 tokens become 68, 73.5 become 74.
    rounded = round(height / factor) * factor, round(width / factor) * factor
    if math.prod(rounded) > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        return math.floor(height / shrink / factor) * factor, math.floor(width / shrink / factor) * factor
    if math.prod(rounded) < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        return math.ceil(height * grow / factor) * factor, math.ceil(width * grow / factor) * factor
    return rounded


def _check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, Integral) or not 1 <= number < 2**31:
            raise ValueError(f"{name} must be a positive integer below 2**31, found {str(number)[:40]}")
