"""Image sets in an .npz, as OpenAI's evaluator and the CCA paper's authors exchange them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_cca.data.sources.foreign_text import printable
from megatron_cca.errors import UserError, said_of
from megatron_cca.io.external_files import ZIP, kind_of_file
from megatron_cca.io.numpy_files import archived_arrays, archived_names

IMAGES, LABELS = "arr_0", "arr_1"
_MOMENTS = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
Moments = dict[str, tuple[np.ndarray, np.ndarray]]


def read_archive(path: Path) -> tuple[np.ndarray, np.ndarray | None, None, Moments, tuple[str, ...]]:
    """Images uint8 ``[N, H, W, 3]``, labels int64 ``[N]`` or None, no prompts, the moments, and what is not read.

    OpenAI's reference batches hold 10,000 images beside ``mu`` and ``sigma`` of the whole training set's Inception
    features (``mu_s`` and ``sigma_s`` of the spatial ones); their FID is to the latter.

    Raises:
        UserError: a damaged file, no ``arr_0``, or arrays of another type or shape.
    """
    with said_of(path):
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
