"""Mean and covariance of a reference's features, kept in an ``.npz``, so that a large reference is read once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from torch import nn

from megatron_cca.errors import UserError
from megatron_cca.io.outputs import file_system_errors, whole_file
from megatron_cca.lab.evaluation.archives import MOMENTS
from megatron_cca.lab.evaluation.image_sets import ImageSet

SAVE = "--save-statistics"


def fingerprint_of(name: str, origin: Mapping[str, str]) -> str:
    """Return the SHA-256 of an extractor's weights, or its name where it has no file."""
    return origin.get("sha256", name)


def save_statistics(
    path: Path, moments: Mapping[str, tuple[np.ndarray, np.ndarray]], extractor: nn.Module, images: np.ndarray
) -> None:
    """Write the statistics of a reference, and what they are of. The file is whole, or not there.

    Args:
        path: a new ``.npz``, or one that is replaced.
        moments: ``mu`` float64 ``[D]`` and ``sigma`` float64 ``[D, D]`` of parts.
        extractor: gave the features.
        images: the reference, ``[N, H, W, 3]``.
    """
    arrays = {name: array for part, pair in moments.items() for name, array in zip(MOMENTS[part], pair, strict=True)}
    with file_system_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as partial, partial.open("wb") as file:
            np.savez(
                file,
                **arrays,
                extractor=extractor.name.partition(":")[0],
                fingerprint=fingerprint_of(extractor.name, extractor.origin),
                images=len(images),
                size=images.shape[1:3],
            )


def check_owner(reference: ImageSet, path: str, network: str) -> None:
    """Refuse mu and sigma without images that are of other extractors, or say nothing while this is not Inception.

    Raises:
        UserError: names the reference's path and the extractor.
    """
    if reference.moments_of is not None:
        if network.partition(":")[0] not in reference.moments_of:
            owners = " and ".join(sorted(reference.moments_of))
            raise UserError(f"--reference: {path} holds statistics of {owners}, found --extractor {network}")
        return
    if not len(reference.images) and reference.statistics is None and network != "inception":
        raise UserError(
            f"--reference: {path} does not say of which extractor its mu and sigma are; such files are Inception's, "
            f"found --extractor {network}"
        )


def check_statistics(
    reference: ImageSet, path: str, network: str, origin: Mapping[str, str], sets: Iterable[ImageSet]
) -> None:
    """Refuse statistics without images that are of another extractor, or of images of another size.

    Args:
        reference: the reference; one with images is not checked.
        path: its path, for messages.
        network: the extractor's name.
        origin: the source of its weights.
        sets: the samples.

    Raises:
        UserError: says whose they are and what would be right.
    """
    found = reference.statistics
    if found is None:
        return
    if found.fingerprint != fingerprint_of(network, origin):
        same = found.extractor == network.partition(":")[0]
        raise UserError(
            f"--reference: {path} holds statistics of {found.extractor}{' with other weights' if same else ''}, "
            f"found --extractor {network}; name that one, or write them anew with {SAVE}"
        )
    for one in sets:
        if one.images.shape[1:3] != found.size:
            ours, theirs = (" x ".join(map(str, size)) for size in (one.images.shape[1:3], found.size))
            raise UserError(
                f"--reference: {path} holds statistics of images of {theirs} pixels, the samples have {ours}"
            )
