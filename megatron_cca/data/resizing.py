"""Decode and resize images: with DALI in one pass, or with Pillow step by step as the models' authors do.

Both classes have the same methods. Sizes are those of :mod:`megatron_cca.data.image_size`. A *plan* is the sequence of
sizes that an image passes through. It is tokenised at the last one, or cropped from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_cca.data.dali import is_installed
from megatron_cca.data.dali_images import ImageDecoder
from megatron_cca.data.image_checks import check_image, stored_image
from megatron_cca.data.image_headers import ImageLimits, Rejected
from megatron_cca.data.image_size import covering_size, scaled_size, target_size
from megatron_cca.errors import UserError

DALI, AUTHORS = "dali", "authors"


def check_resizing(resize: str) -> None:
    """Refuse a resizing whose library is not installed.

    Raises:
        UserError: names the option.
    """
    if resize == DALI and not is_installed():
        raise UserError(
            f"--resize: {DALI} needs NVIDIA DALI; pip install -e '.[data]', or take {AUTHORS}, which needs Pillow alone"
        )


class ResizeStep(NamedTuple):
    """A resizing to ``height`` x ``width`` pixels, by the mean of pixels (box filter) or by bicubic interpolation."""

    height: int
    width: int
    is_mean: bool = False


ResizePlan = tuple[ResizeStep, ...]


class Resizing(Protocol):
    """The interface of what decodes and resizes the images of a job."""

    def check_image(self, data: bytes) -> tuple[int, int]:
        """Check an encoded image and return its height and width.

        See :func:`megatron_cca.data.image_checks.check_image`.
        """

    def to_area(self, height: int, width: int, area: int, factor: int) -> ResizePlan:
        """Return the plan for a model of any grid. See :func:`target_size` for arguments and errors."""

    def to_cover(self, height: int, width: int, side: int) -> ResizePlan:
        """Return the plan for a model of one grid: the shorter side becomes ``side``, and the middle is cropped."""

    def decode(self, images: Sequence[bytes], plans: Sequence[ResizePlan]) -> list[Tensor | Rejected]:
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

    def to_area(self, height: int, width: int, area: int, factor: int) -> ResizePlan:
        """See :class:`Resizing`."""
        return (ResizeStep(*target_size(height, width, area, factor)),)

    def to_cover(self, height: int, width: int, side: int) -> ResizePlan:
        """See :class:`Resizing`."""
        return (ResizeStep(*covering_size(height, width, side, side)),)

    def decode(self, images: Sequence[bytes], plans: Sequence[ResizePlan]) -> list[Tensor | Rejected]:
        """See :class:`Resizing`."""
        return self._decoder.decode(images, [plan[-1][:2] for plan in plans])


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

    def to_area(self, height: int, width: int, area: int, factor: int) -> ResizePlan:
        """See :class:`Resizing`."""
        final = target_size(height, width, area, factor)
        return (ResizeStep(*scaled_size(height, width, area)), ResizeStep(*final))

    def to_cover(self, height: int, width: int, side: int) -> ResizePlan:
        """See :class:`Resizing`."""
        steps = []
        while min(height, width) >= 2 * side:
            height, width = height // 2, width // 2
            steps.append(ResizeStep(height, width, is_mean=True))
        scale = side / min(height, width)
        return (*steps, ResizeStep(round(height * scale), round(width * scale)))

    def decode(self, images: Sequence[bytes], plans: Sequence[ResizePlan]) -> list[Tensor | Rejected]:
        """See :class:`Resizing`."""
        return list(self._pool.map(self._decoded, images, plans))

    def _decoded(self, data: bytes, plan: ResizePlan) -> Tensor | Rejected:
        try:
            image = stored_image(data, self._limits)
        except Rejected as reason:
            return reason
        from PIL.Image import Resampling

        for height, width, is_mean in plan:
            image = image.resize((width, height), Resampling.BOX if is_mean else Resampling.BICUBIC)
        return torch.from_numpy(np.array(image)).to(self._device)


RESIZINGS: dict[str, type[DaliResizing | AuthorsResizing]] = {DALI: DaliResizing, AUTHORS: AuthorsResizing}
