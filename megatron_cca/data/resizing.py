"""Who decodes images and brings them to size: DALI in one pass, or Pillow step by step as the models' authors do.

Both have the same methods. Sizes are those of :mod:`megatron_cca.data.image_size`; a *plan* is the sizes that an image
passes through, the last of which it is tokenised at (or cut out of).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_cca.data.dali import ImageDecoder, is_installed
from megatron_cca.data.image_headers import ImageLimits, Rejected
from megatron_cca.data.image_size import covering_size, scaled_size, target_size
from megatron_cca.data.images import judge, stored_image
from megatron_cca.errors import UserError

DALI, AUTHORS = "dali", "authors"


def check_resizing(resize: str) -> None:
    """Refuse a way that needs what is not here.

    Raises:
        UserError: names the option.
    """
    if resize == DALI and not is_installed():
        raise UserError(
            f"--resize: {DALI} needs NVIDIA DALI; pip install -e '.[data]', or take {AUTHORS}, which needs Pillow alone"
        )


class Step(NamedTuple):
    """A resizing to ``height`` x ``width`` pixels: by the mean of what falls together, or by bicubic interpolation."""

    height: int
    width: int
    is_mean: bool = False


Plan = tuple[Step, ...]


class Resizing(Protocol):
    """Decodes and resizes the images of a job."""

    def judge(self, data: bytes) -> tuple[int, int]:
        """Height and width of an encoded image, as :func:`megatron_cca.data.images.judge` returns or rejects it."""

    def to_area(self, height: int, width: int, area: int, factor: int) -> Plan:
        """Plan for a model of any grid; see :func:`target_size` for arguments and errors."""

    def to_cover(self, height: int, width: int, side: int) -> Plan:
        """Plan for a model of one grid: the shorter side becomes ``side``, out of which the middle is cut."""

    def decode(self, images: Sequence[bytes], plans: Sequence[Plan]) -> list[Tensor | Rejected]:
        """Decode and resize judged images: uint8 ``[H, W, 3]``, RGB, each on the job's device, or why there is none."""


class ByDali:
    """A single bicubic pass, upright as EXIF says; on a GPU where there is one.

    Args:
        device: where the results are wanted.
        threads: of DALI, on the CPU.
        limits: of an image.

    Raises:
        UserError: DALI is not installed, or does not start.
    """

    def __init__(self, device: torch.device, threads: int, limits: ImageLimits) -> None:
        self._limits, self._decoder = limits, ImageDecoder(device, threads, limits)

    def judge(self, data: bytes) -> tuple[int, int]:
        """See :class:`Resizing`."""
        return judge(data, self._limits)

    def to_area(self, height: int, width: int, area: int, factor: int) -> Plan:
        """See :class:`Resizing`."""
        return (Step(*target_size(height, width, area, factor)),)

    def to_cover(self, height: int, width: int, side: int) -> Plan:
        """See :class:`Resizing`."""
        return (Step(*covering_size(height, width, side, side)),)

    def decode(self, images: Sequence[bytes], plans: Sequence[Plan]) -> list[Tensor | Rejected]:
        """See :class:`Resizing`."""
        return self._decoder.decode(images, [plan[-1][:2] for plan in plans])


class AsTheAuthors:
    """Pillow's decoding and resizing in the order of the authors' programs, bit for bit.

    To an area as baaivision/Emu3's ``prepare_data.py`` and image processor, one after the other. To one grid as the
    ``center_crop_arr`` that LlamaGen's ``extract_codes_c2i.py`` has from ADM. Both take an image as it is stored:
    EXIF's orientation is not applied. Both read JPEGs of four components.

    Args:
        device: where the results are wanted.
        threads: that decode.
        limits: of an image.
    """

    def __init__(self, device: torch.device, threads: int, limits: ImageLimits) -> None:
        self._device, self._limits = device, replace(limits, cmyk=True)
        self._pool = ThreadPoolExecutor(threads)

    def judge(self, data: bytes) -> tuple[int, int]:
        """See :class:`Resizing`."""
        return judge(data, self._limits, upright=False)

    def to_area(self, height: int, width: int, area: int, factor: int) -> Plan:
        """See :class:`Resizing`."""
        final = target_size(height, width, area, factor)
        return (Step(*scaled_size(height, width, area)), Step(*final))

    def to_cover(self, height: int, width: int, side: int) -> Plan:
        """See :class:`Resizing`."""
        steps = []
        while min(height, width) >= 2 * side:
            height, width = height // 2, width // 2
            steps.append(Step(height, width, is_mean=True))
        scale = side / min(height, width)
        return (*steps, Step(round(height * scale), round(width * scale)))

    def decode(self, images: Sequence[bytes], plans: Sequence[Plan]) -> list[Tensor | Rejected]:
        """See :class:`Resizing`."""
        return list(self._pool.map(self._decoded, images, plans))

    def _decoded(self, data: bytes, plan: Plan) -> Tensor | Rejected:
        try:
            image = stored_image(data, self._limits)
        except Rejected as reason:
            return reason
        from PIL.Image import Resampling

        for height, width, is_mean in plan:
            image = image.resize((width, height), Resampling.BOX if is_mean else Resampling.BICUBIC)
        return torch.from_numpy(np.array(image)).to(self._device)


RESIZINGS: dict[str, type[ByDali | AsTheAuthors]] = {DALI: ByDali, AUTHORS: AsTheAuthors}
