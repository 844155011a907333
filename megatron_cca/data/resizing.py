"""Decode and resize images: with DALI in one pass, or with Pillow step by step as the models' authors do.

Both ways are a :class:`Resizing`. It first says which sizes an image passes through. The image is tokenised at the last
one, or cropped from it.

For models of any grid, Emu3's rule has two steps (baaivision/Emu3). ``train/prepare_data.py`` scales to an area. The
image processor then rounds the sides to multiples of the tokenizer's factor and keeps the area between two bounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from numbers import Integral
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_cca.data.dali import is_installed
from megatron_cca.data.dali_images import ImageDecoder
from megatron_cca.data.image_headers import ImageLimits, Rejected, check_image, stored_image
from megatron_cca.errors import UserError

# Bounds and limit of the image processor.
MIN_PIXELS, MAX_PIXELS, MAX_ASPECT = 512 * 512, 1024 * 1024, 5
DALI, AUTHORS = "dali", "authors"


def check_resizing(resize: str) -> None:
    """Refuse a resizing whose library is not installed.

    Raises:
        UserError: names the option.
    """
    if resize == DALI and not is_installed():
        raise UserError(
            f"--resize: {DALI} needs NVIDIA DALI; pip install 'megatron-cca[data]', or take {AUTHORS}, which needs "
            "Pillow alone"
        )


class ResizeStep(NamedTuple):
    """A resizing to ``height`` x ``width`` pixels, by the mean of pixels (box filter) or by bicubic interpolation."""

    height: int
    width: int
    is_mean: bool = False


ResizeSteps = tuple[ResizeStep, ...]


class Resizing(Protocol):
    """The interface of what decodes and resizes the images of a job."""

    def check_image(self, data: bytes) -> tuple[int, int]:
        """Check an encoded image and return its height and width.

        See :func:`megatron_cca.data.image_headers.check_image`.
        """

    def to_area(self, height: int, width: int, area: int, factor: int) -> ResizeSteps:
        """Return the steps for a model of any grid. See :func:`target_size` for arguments and errors."""

    def to_cover(self, height: int, width: int, side: int) -> ResizeSteps:
        """Return the steps for a model of one grid: the shorter side becomes ``side``, and the middle is cropped."""

    def decode(self, images: Sequence[bytes], steps: Sequence[ResizeSteps]) -> list[Tensor | Rejected]:
        """Decode and resize checked images.

        Each becomes uint8 ``[H, W, 3]``, RGB, on the job's device, or the reason why not.
        """


class DaliResizing:
    """A single bicubic pass, upright as EXIF says, on a GPU where there is one.

    Args:
        device: of the results.
        threads: of DALI, on the CPU.
        limits: of an image.

    Raises:
        UserError: DALI is not installed, or does not start.
    """

    def __init__(self, device: torch.device, threads: int, limits: ImageLimits) -> None:
        self._limits, self._decoder = limits, ImageDecoder(device, threads, limits)

    def check_image(self, data: bytes) -> tuple[int, int]:
        """See :class:`Resizing`."""
        return check_image(data, self._limits)

    def to_area(self, height: int, width: int, area: int, factor: int) -> ResizeSteps:
        """See :class:`Resizing`."""
        return (ResizeStep(*target_size(height, width, area, factor)),)

    def to_cover(self, height: int, width: int, side: int) -> ResizeSteps:
        """See :class:`Resizing`."""
        return (ResizeStep(*covering_size(height, width, side, side)),)

    def decode(self, images: Sequence[bytes], steps: Sequence[ResizeSteps]) -> list[Tensor | Rejected]:
        """See :class:`Resizing`."""
        return self._decoder.decode(images, [of_one[-1][:2] for of_one in steps])


class AuthorsResizing:
    """Pillow's decoding and resizing in the order of the authors' programs, bit for bit.

    For an area, these are the steps of baaivision/Emu3's ``prepare_data.py`` and of its image processor. For one grid,
    it is ``center_crop_arr``, which LlamaGen's ``extract_codes_c2i.py`` has from ADM. Both take an image as it is
    stored, without EXIF's orientation. Both read JPEGs of four components.

    Args:
        device: of the results.
        threads: how many decode.
        limits: of an image.
    """

    def __init__(self, device: torch.device, threads: int, limits: ImageLimits) -> None:
        self._device, self._limits = device, replace(limits, cmyk=True)
        self._pool = ThreadPoolExecutor(threads)

    def check_image(self, data: bytes) -> tuple[int, int]:
        """See :class:`Resizing`."""
        return check_image(data, self._limits, upright=False)

    def to_area(self, height: int, width: int, area: int, factor: int) -> ResizeSteps:
        """See :class:`Resizing`."""
        final = target_size(height, width, area, factor)
        return (ResizeStep(*scaled_size(height, width, area)), ResizeStep(*final))

    def to_cover(self, height: int, width: int, side: int) -> ResizeSteps:
        """See :class:`Resizing`."""
        steps = []
        while min(height, width) >= 2 * side:
            height, width = height // 2, width // 2
            steps.append(ResizeStep(height, width, is_mean=True))
        scale = side / min(height, width)
        return (*steps, ResizeStep(round(height * scale), round(width * scale)))

    def decode(self, images: Sequence[bytes], steps: Sequence[ResizeSteps]) -> list[Tensor | Rejected]:
        """See :class:`Resizing`."""
        return list(self._pool.map(self._decoded, images, steps))

    def _decoded(self, data: bytes, steps: ResizeSteps) -> Tensor | Rejected:
        try:
            image = stored_image(data, self._limits)
        except Rejected as reason:
            return reason
        from PIL.Image import Resampling

        for height, width, is_mean in steps:
            image = image.resize((width, height), Resampling.BOX if is_mean else Resampling.BICUBIC)
        return torch.from_numpy(np.array(image)).to(self._device)


RESIZINGS: dict[str, type[DaliResizing | AuthorsResizing]] = {DALI: DaliResizing, AUTHORS: AuthorsResizing}


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
