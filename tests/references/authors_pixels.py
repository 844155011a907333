"""How the models' authors bring an image to size, restated with Pillow, transformers and torchvision alone."""

from __future__ import annotations

import io
from importlib.resources import files

import numpy as np
from PIL import Image


def photographs() -> dict[str, bytes]:
    """scikit-learn's two photographs, 427 x 640, as the JPEG files that it ships."""
    folder = files("sklearn.datasets.images")
    return {name: (folder / name).read_bytes() for name in ("china.jpg", "flower.jpg")}


def emu3_pixels(data: bytes, area: int, factor: int = 8, bounds: tuple[int, int] = (512**2, 1024**2)) -> np.ndarray:
    """uint8 ``[H, W, 3]``: ``prepare_data.py`` scales to an area, transformers' image processor does the rest.

    The authors' processor was taken into transformers: both resize alike where the longer side is 5 times the shorter
    at most. Today's conversion to RGB is another one, though: it lays a transparent colour over white.
    """
    from transformers import Emu3ImageProcessor

    image = Image.open(io.BytesIO(data)).convert("RGB")
    by = (area / (image.width * image.height)) ** 0.5
    image = image.resize((round(image.width * by), round(image.height * by)))
    processor = Emu3ImageProcessor(
        spatial_factor=factor,
        min_pixels=bounds[0],
        max_pixels=bounds[1],
        do_convert_rgb=False,
        do_rescale=False,
        do_normalize=False,
    )
    (planes,) = processor(image, return_tensors="np")["pixel_values"]
    return np.moveaxis(planes.reshape(planes.shape[-3:]), 0, -1).astype(np.uint8)


def adm_pixels(data: bytes, side: int) -> np.ndarray:
    """uint8 ``[side, side, 3]``: ADM's square from the middle, as LlamaGen's extraction of codes takes it."""
    from torchvision.transforms import functional

    image = Image.open(io.BytesIO(data)).convert("RGB")
    while side * 2 <= image.width and side * 2 <= image.height:
        image = functional.resize(image, [image.height // 2, image.width // 2], functional.InterpolationMode.BOX)
    by = side / min(image.width, image.height)
    sides = [round(image.height * by), round(image.width * by)]
    image = functional.resize(image, sides, functional.InterpolationMode.BICUBIC)
    return np.asarray(functional.crop(image, (sides[0] - side) // 2, (sides[1] - side) // 2, side, side))
