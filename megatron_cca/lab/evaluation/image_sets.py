"""Sets of images for evaluation: a folder, an .npz, tools/generate.py's output, or the digits.

The format of an .npz is that of OpenAI's evaluator and of the CCA paper's authors.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from tqdm import tqdm

from megatron_cca.data.image_headers import Rejected, read_header
from megatron_cca.data.sources.foreign_text import printable
from megatron_cca.errors import UserError, error_context
from megatron_cca.io.external_files import ZIP, kind_of_file
from megatron_cca.io.numpy_files import archived_arrays, archived_names
from megatron_cca.io.typed_paths import typed_path
from megatron_cca.lab.evaluation.listings import HELD_OUT, WORDS, Listing, check_path, list_folder

IMAGES, LABELS = "arr_0", "arr_1"
_MOMENTS = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
Moments = dict[str, tuple[np.ndarray, np.ndarray]]


def read_archive(path: Path) -> tuple[np.ndarray, np.ndarray | None, None, Moments, tuple[str, ...]]:
    """Read images, labels, moments and notices from an .npz.

    The images are uint8 ``[N, H, W, 3]``. The labels are int64 ``[N]`` or None. The prompts are always None. The
    notices name arrays that were not read.

    OpenAI's reference batches have 10,000 images. They also have ``mu`` and ``sigma`` of the Inception features of the
    whole training set, and ``mu_s`` and ``sigma_s`` of the spatial ones. OpenAI's FID uses these moments.

    Raises:
        UserError: a damaged file, no ``arr_0``, or arrays of another type or shape.
    """
    with error_context(path):
        if (kind := kind_of_file(path)) not in (None, ZIP):
            raise UserError(f"cannot be read as .npz: it is {kind}; write it with numpy.savez")
        known = {IMAGES, LABELS, *(name for names in _MOMENTS.values() for name in names)}
        arrays = archived_arrays(path, known)
        others = ", ".join(map(printable, sorted(set(archived_names(path)) - known)))
    if IMAGES not in arrays:
        found = f", found {others}" if others else ""
        raise UserError(f"{path}: has no {IMAGES}; it must hold the images, uint8 [N, H, W, 3]{found}")
    images = arrays[IMAGES]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise UserError(f"{path}: {IMAGES} must be uint8 [N, H, W, 3], found {images.dtype} {list(images.shape)}")
    if not len(images):
        raise UserError(f"{path}: {IMAGES} holds no images")
    notices = (f"arrays are not read: {others}",) if others else ()
    return images, _labels(path, arrays.get(LABELS), len(images)), None, _moments(path, arrays), notices


def _labels(path: Path, labels: np.ndarray | None, count: int) -> np.ndarray | None:
    if labels is None:
        return None
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"{path}: {LABELS} must hold a whole number for each of the {count} images, found {labels.dtype} "
            f"{list(labels.shape)}"
        )
    return labels.astype(np.int64)


def _moments(path: Path, arrays: dict[str, np.ndarray]) -> Moments:
    found = {}
    for part, (mean, covariance) in _MOMENTS.items():
        if mean in arrays and covariance in arrays:
            mu, sigma = arrays[mean], arrays[covariance]
            if mu.dtype.kind != "f" or sigma.dtype.kind != "f":
                raise UserError(f"{path}: {mean} and {covariance} must be numbers, found {mu.dtype} and {sigma.dtype}")
            mu, sigma = mu.astype(np.float64), sigma.astype(np.float64)
            if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
                raise UserError(
                    f"{path}: {mean} and {covariance} must be [D] and [D, D], found {list(mu.shape)} and "
                    f"{list(sigma.shape)}"
                )
            found[part] = mu, sigma
    return found


_OPAQUE = 255


@dataclass(frozen=True)
class ImageSet:
    """Images with their labels, prompts, moments and notices.

    Attributes:
        images: uint8 ``[N, H, W, 3]``, RGB.
        labels: int64 ``[N]`` or None, the requested classes.
        prompts: ``N`` texts or None.
        moments: mean and covariance of Inception's ``features`` and ``spatial`` features over more images than these,
            as in OpenAI's reference batches; otherwise empty.
        notices: one line for each kind of file or array that was not read, or only in part.
    """

    images: np.ndarray
    labels: np.ndarray | None = None
    prompts: list[str] | None = None
    moments: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None
    notices: tuple[str, ...] = ()


def read_images(path: str | Path) -> ImageSet:
    """Read a set of images.

    Many images show a progress bar.

    Args:
        path: a folder of PNG or JPEG files, there or one level below, in the order of their names; a folder with
            ``prompts.jsonl`` from tools/generate.py, in its order; an ``.npz`` with ``arr_0`` uint8 ``[N, H, W, 3]``
            and perhaps labels in ``arr_1``; or the words ``digits`` (the training scans) and ``digits-held-out``.

    Raises:
        UserError: names an image or file that is missing, empty, unreadable, or of another size than the others.
    """
    if str(path) in WORDS:
        from megatron_cca.data.digits import load_scans

        scans = load_scans()[str(path) == HELD_OUT]
        return ImageSet(np.repeat(scans.images[..., None], 3, axis=3), scans.labels)
    check_path(path)
    path = Path(typed_path(str(path)))
    if path.is_file():
        return ImageSet(*read_archive(path))
    listing = list_folder(path)
    images, transparent = _read_files(listing)
    notices = listing.notices
    if transparent:
        notices += (f"{transparent} of {len(images)} images are transparent in places; alpha is dropped",)
    return ImageSet(images, listing.labels, listing.prompts, notices=notices)


def _read_files(listing: Listing) -> tuple[np.ndarray, int]:
    """Return the images, and the number of images with transparent pixels."""
    transparent, (first, _) = 0, _decode(listing.files[0])
    images = np.empty((len(listing.files), *first.shape), dtype=np.uint8)
    with (
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        tqdm(total=len(images), unit="image", desc=f"reading {listing.folder.name}", disable=None) as bar,
    ):
        for index, (file, decoded) in enumerate(zip(listing.files, pool.map(_decode, listing.files), strict=True)):
            pixels, is_transparent = decoded
            if pixels.shape != first.shape:
                pool.shutdown(wait=False, cancel_futures=True)
                raise UserError(
                    f"{file}: {_size(pixels)} pixels, but {listing.files[0].name} has {_size(first)}; all images of a "
                    "set must be of one size"
                )
            images[index] = pixels
            transparent += is_transparent
            bar.update()
    return images, transparent


def _size(pixels: np.ndarray) -> str:
    return f"{pixels.shape[0]} x {pixels.shape[1]}"


def _decode(file: Path) -> tuple[np.ndarray, bool]:
    """Decode an image to uint8 ``[H, W, 3]``, upright and without alpha.

    Also return whether it has transparent pixels.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise UserError("reading images needs Pillow; pip install -e '.[data]'") from None
    try:
        data = file.read_bytes()
        header = read_header(data)
        with Image.open(BytesIO(data if header.orientation != 1 else header.essential)) as image:
            upright = ImageOps.exif_transpose(image)
            has_alpha = "A" in upright.getbands() or "transparency" in upright.info
            is_transparent = has_alpha and upright.convert("RGBA").getextrema()[3][0] < _OPAQUE
            return np.asarray(upright.convert("RGB")), is_transparent
    except Rejected as rejected:
        raise UserError(f"{file}: {rejected}") from None
    except Exception as error:  # Pillow promises no closed set of exceptions for damaged files.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{file}: the image cannot be read ({reason})") from None
