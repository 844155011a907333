"""Files of images or of their statistics: OpenAI's .npz, EDM's .npz and .pkl, and what --save-statistics writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_cca.data.sources.external_text import printable
from megatron_cca.errors import UserError, error_context
from megatron_cca.io.file_contents import ZIP, archived_arrays, archived_names, kind_of_file
from megatron_cca.io.pickled_arrays import pickled_arrays

PICKLE = ".pkl"
# Arrays of an .npz.
IMAGES, LABELS = "arr_0", "arr_1"
MOMENTS = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
NO_IMAGES = np.zeros((0, 0, 0, 3), np.uint8)
# Metrics of EDM2's table, and the extractors that they are on.
_EDM2 = {"fid": "inception", "fd_dinov2": "dinov2"}

Moments = dict[str, tuple[np.ndarray, np.ndarray]]


class Statistics(NamedTuple):
    """The origin of the moments of a file without images.

    ``fingerprint`` is of the extractor's weights. ``images`` is their number, ``size`` height and width in pixels.
    """

    extractor: str
    fingerprint: str
    images: int
    size: tuple[int, int]


def read_archive(path: Path) -> tuple:
    """Read images, labels, moments, notices and the origin of moments from an .npz.

    The images are uint8 ``[N, H, W, 3]``. The labels are int64 ``[N]`` or None. The prompts are always None. The
    notices name arrays that were not read.

    A file of mu and sigma alone has no images, ``[0, 0, 0, 3]``: EDM's ``.npz``, or that of ``--save-statistics``,
    which also says what they are of.

    OpenAI's reference batches have 10,000 images. They also have ``mu`` and ``sigma`` of the Inception features of the
    whole training set, and ``mu_s`` and ``sigma_s`` of the spatial ones. OpenAI's FID uses these moments.

    Raises:
        UserError: a damaged file, no ``arr_0``, or arrays of another type or shape.
    """
    with error_context(path):
        if (kind := kind_of_file(path)) not in (None, ZIP):
            raise UserError(f"cannot be read as .npz: it is {kind}; write it with numpy.savez")
        known = {IMAGES, LABELS, *(name for names in MOMENTS.values() for name in names)}
        arrays = archived_arrays(path, known)
        if IMAGES not in arrays and "mu" in arrays:
            known |= {*Statistics._fields}
            arrays = archived_arrays(path, known)
        others = ", ".join(map(printable, sorted(set(archived_names(path)) - known)))
    if IMAGES not in arrays and (moments := _moments(path, arrays)):
        return NO_IMAGES, None, None, moments, (), _statistics(path, arrays)
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


def _statistics(path: Path, arrays: dict[str, np.ndarray]) -> Statistics | None:
    if not {*Statistics._fields} & arrays.keys():
        return None
    try:
        extractor, fingerprint, images, size = (arrays[name].tolist() for name in Statistics._fields)
        height, width = size
        return Statistics(str(extractor), str(fingerprint), int(images), (int(height), int(width)))
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: extractor, fingerprint, images and size are damaged; write it anew") from None


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
    for part, (mean, covariance) in MOMENTS.items():
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
            if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
                raise UserError(f"{path}: {mean} and {covariance} are not all finite numbers; write them anew")
            found[part] = mu, sigma
    return found


def read_pickle(path: Path) -> dict[str, Moments]:
    """Read the moments in a ``.pkl`` of EDM or EDM2 by the kind of their extractor. Nothing in it runs.

    EDM's holds ``mu`` and ``sigma`` of Inception. EDM2's holds a table of them for each metric: ``fid`` for Inception
    and ``fd_dinov2`` for DINOv2.

    Raises:
        UserError: a damaged file, one that holds something else than numbers and arrays, or none of these tables.
    """
    with error_context(path):
        found = pickled_arrays(path)
    tables = found if any(name in found for name in _EDM2) else {"fid": found}
    moments = {}
    for name, extractor in _EDM2.items():
        if isinstance(tables.get(name), dict) and (one := _moments(path, _arrays(tables[name]))):
            moments[extractor] = one
    if not moments:
        shown = ", ".join(map(printable, sorted(found)))[:120] or "nothing"
        raise UserError(f"{path}: has no mu and sigma, and none of {', '.join(_EDM2)} that hold them; found {shown}")
    return moments


def _arrays(table: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {name: value for name, value in table.items() if isinstance(value, np.ndarray)}
