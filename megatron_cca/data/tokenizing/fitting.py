"""Fit a codebook of patches to the images of a source, and the sizes of a tiny model to its images and classes.

This is for trying a data set without anybody's image tokenizer. A model of texts without a text tokenizer gets one that
is trained on the same captions. Both are fitted by process 0, and lie beside the parts until the job is done.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import batched
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from megatron_cca.config import ModelConfig
from megatron_cca.data import is_tiny
from megatron_cca.data.codebooks import (
    PatchCodebook,
    PatchImageTokenizer,
    PyramidCodebook,
    grey_levels,
    open_patch_tokenizer,
    patches_of,
)
from megatron_cca.data.image_headers import Rejected, check_image
from megatron_cca.data.manifest import FILE_NAME as MANIFEST
from megatron_cca.data.manifest import read_manifest
from megatron_cca.data.resizing import DALI
from megatron_cca.data.sources import Source, Unreadable
from megatron_cca.data.sources.external_text import short_hash
from megatron_cca.data.tiny_sizes import recorded_model
from megatron_cca.data.tokenizers import TOKENIZER_FILE, open_text_tokenizer, train_tokenizer
from megatron_cca.data.tokenizing import TokenizeSettings
from megatron_cca.data.tokenizing.samples import Prepared, SampleMaker
from megatron_cca.errors import UserError
from megatron_cca.io.outputs import OPTION
from megatron_cca.models import resolve_architecture
from megatron_cca.models.architecture import Architecture

if TYPE_CHECKING:
    from megatron_cca.data.tokenizing.job import TokenizingJob

# What a codebook is fitted to: so many images of the source, and so many patches of them.
IMAGES, PATCHES, SEED = 2000, 100_000, 0
_CODEBOOK, _PATCH = "--fit-codebook", "--patch"
# The entry of a manifest that says what a codebook was fitted to.
FITTED = "fitted"
_IMAGES_TRIED = 32
_DECODED_TOGETHER = 64
# Of a grid that follows from the images.
_LARGEST_SIDE = 64
_WAIT_SECONDS, _POLL_SECONDS = 3600.0, 0.2


def check_fitting(settings: TokenizeSettings) -> None:
    """Refuse options that do not go with each other.

    Raises:
        UserError: names the option.
    """
    if settings.fit_codebook is None:
        if settings.patch is not None:
            raise UserError(f"{_PATCH}: of no use without {_CODEBOOK}; leave it out")
        return
    if settings.image_tokenizer is not None:
        raise UserError(f"{_CODEBOOK}: of no use beside --image-tokenizer; leave one of them out")
    if settings.patch is None:
        raise UserError(f"{_PATCH}: missing; give the side of a patch in pixels, such as 4")
    if find_spec("sklearn") is None:
        raise UserError(f"{_CODEBOOK}: needs scikit-learn; pip install 'megatron-cca[eval]'")


@dataclass(frozen=True)
class PatchSizes:
    """The sizes of a codebook of patches: how many, their side in pixels, and the classes of the data it is of.

    ``entry`` is that of a manifest, for one that was fitted before.
    """

    codes: int
    patch: int
    classes: int | None
    entry: dict | None = None


def fitted_before(settings: TokenizeSettings) -> PatchSizes | None:
    """Return the sizes of an image tokenizer that was fitted to other images of the same data set.

    None if it is another one.

    Raises:
        UserError: its folder is damaged; names the file.
    """
    folder = settings.image_tokenizer
    if folder is None or not (folder / MANIFEST).is_file():
        return None
    manifest = read_manifest(folder)
    was, model = manifest.get(FITTED), recorded_model(folder, manifest)
    if was is None or model is None:
        return None
    return PatchSizes(was["codes"], was["patch"], model.num_classes, was)


def to_be_fitted(settings: TokenizeSettings, source: Source) -> PatchSizes:
    """Return the sizes of the codebook that the options ask for."""
    return PatchSizes(settings.fit_codebook, settings.patch, getattr(source, "num_classes", None))


def with_sizes_of(settings: TokenizeSettings, source: Source, patches: PatchSizes) -> TokenizeSettings:
    """Return the settings with what they leave open: the sizes of a tiny preset, and the area of its images.

    Args:
        settings: of a codebook of patches.
        source: the images. The first one that can be read has the size of all.
        patches: of the codebook.

    Raises:
        UserError: patches do not divide the images, or the grid is too large; names the option.
    """
    size = _first_size(source, settings)
    if settings.area is None and size is not None:
        settings = replace(settings, area=size[0] * size[1])
    if settings.sizes is not None or not is_tiny(settings.model):
        return settings
    preset = resolve_architecture(ModelConfig(name=settings.model))
    sizes = ModelConfig(name=settings.model, codebook_size=patches.codes)
    if preset.vocabulary.num_classes is not None:
        sizes = replace(sizes, num_classes=patches.classes)
    if preset.position_embedding == "rope_2d" and (settings.grid or size):
        side = settings.grid[0] if settings.grid else _side(min(size), patches.patch)
        sizes = replace(sizes, max_position_embeddings=preset.prefix_tokens + side**2)
    return replace(settings, sizes=sizes)


def unfitted(settings: TokenizeSettings, architecture: Architecture) -> PatchImageTokenizer:
    """Return a stand-in of the right sizes for the tokenizer that is fitted later.

    Raises:
        UserError: a codebook or patches of other sizes than the model's; names the option.
    """
    size, own = settings.fit_codebook, architecture.vocabulary.codebook_size
    if size != own:
        raise UserError(f"{_CODEBOOK}: {size} codes, model {settings.model} has {own}; give that number")
    if architecture.scales and _colours(settings, architecture) is None:
        raise UserError(
            f"{_PATCH}: {settings.patch} pixels, while a patch of model {settings.model} has "
            f"{architecture.feature_channels} levels, grey or of three colours"
        )
    blank = np.zeros((size, settings.patch, settings.patch), np.float32)
    return PatchImageTokenizer(
        PyramidCodebook(blank, architecture.scales) if architecture.scales else PatchCodebook(blank)
    )


@contextmanager
def fitted(job: TokenizingJob, rank: int, device: torch.device) -> Iterator[TokenizingJob]:
    """Give the job with a fitted image tokenizer, and a text tokenizer where it has none and needs one.

    A block that fails before any part is finished leaves nothing behind.

    Raises:
        UserError: too few different patches; or, on other processes, process 0 does not end in time.
    """
    if job.settings.fit_codebook is None:
        yield job
        return
    folder = job.parts.folder / f"fitted-{short_hash(job.source.fingerprint(), *_all_facts(job))}"
    try:
        if rank == 0 and not folder.exists():
            _fit(job, folder, device)
        _wait_for(folder, job)
        text = open_text_tokenizer(folder) if (folder / TOKENIZER_FILE).is_file() else job.text
        settings = replace(job.settings, image_tokenizer=folder)
        yield replace(job, settings=settings, images=open_patch_tokenizer(folder), text=text)
    except BaseException:
        if rank == 0 and not job.parts.done():
            shutil.rmtree(folder, ignore_errors=True)
        raise


def fitted_facts(job: TokenizingJob) -> dict | None:
    """Return what the job's codebook was fitted to, for the manifest. None where none was."""
    settings = job.settings
    if settings.fit_codebook is None:
        before = fitted_before(settings)
        return before and before.entry
    images = min(IMAGES, len(job.source))
    return {"codes": settings.fit_codebook, "patch": settings.patch, "images": images, "seed": SEED}


def _all_facts(job: TokenizingJob) -> tuple:
    settings = job.settings
    sizes = (settings.area, settings.grid, settings.crops, settings.resize, settings.limits.max_pixels)
    return (fitted_facts(job), sizes, job.vocabulary.fingerprint(), job.grid, job.text is None)


def _first_size(source: Source, settings: TokenizeSettings) -> tuple[int, int] | None:
    """Return height and width of the first image of some that can be read. None if there is none."""
    for index in range(min(len(source), _IMAGES_TRIED)):
        try:
            frames = source[index].frames
            if frames:
                return check_image(frames[0], settings.limits, upright=settings.resize == DALI)
        except (Unreadable, Rejected):
            continue
    return None


def _side(pixels: int, patch: int) -> int:
    divisors = [number for number in range(1, min(pixels, _LARGEST_SIDE) + 1) if pixels % number == 0]
    if pixels % patch:
        raise UserError(
            f"{_PATCH}: {patch} does not divide the {pixels} pixels of the first image's shorter side; possible: "
            f"{', '.join(map(str, divisors))}; or choose the codes of an image by --grid, to which images are resized"
        )
    if pixels // patch > _LARGEST_SIDE:
        raise UserError(
            f"{_PATCH}: {patch} makes {pixels // patch} x {pixels // patch} codes of an image of {pixels} pixels, too "
            f"many for a tiny model; give larger patches, or a grid of up to {_LARGEST_SIDE} by --grid"
        )
    return pixels // patch


def _colours(settings: TokenizeSettings, architecture: Architecture) -> int | None:
    """Return how many colours the patches of a model of pyramids have: 1 or 3. None where they have another size."""
    by_channels = {settings.patch**2: 1, 3 * settings.patch**2: 3}
    return by_channels.get(architecture.feature_channels)


def _fit(job: TokenizingJob, folder: Path, device: torch.device) -> None:
    settings = job.settings
    pixels, captions, number = _sampled(job, device)
    is_grey = bool((pixels == pixels[..., :1]).all())
    if job.architecture.scales:
        is_grey = _colours(settings, job.architecture) == 1
    codebook = _codebook(job, grey_levels(pixels) if is_grey else pixels)
    aside = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    codebook.save(aside)
    if job.text is None and job.vocabulary.num_classes is None:
        train_tokenizer(captions, job.vocabulary.text_size).save(str(aside / TOKENIZER_FILE))
    aside.rename(folder)
    kind = "grey" if is_grey else "coloured"
    side = f"{settings.patch} x {settings.patch}"
    print(f"fitted {settings.fit_codebook} {kind} patches of {side} pixels to {number} images", flush=True)


def _sampled(job: TokenizingJob, device: torch.device) -> tuple[np.ndarray, list[str], int]:
    """Return patches ``[M, P, P, 3]`` of some images, or the images for a pyramid, their captions, and their number."""
    maker = SampleMaker(job.source, job.vocabulary, job.images, job.text, device, job.settings, job.grid)
    maker.check_some(job.settings.max_skipped)
    random = np.random.default_rng(SEED)
    chosen = np.sort(random.permutation(len(job.source))[:IMAGES])
    found, captions = [], []
    for records in batched(chosen.tolist(), _DECODED_TOGETHER):
        for one in maker.prepare(records):
            if isinstance(one, Prepared) and one.pixels is not None:
                # The first crop, where there are several.
                image = one.pixels.cpu().numpy().reshape(-1, *one.pixels.shape[-3:])[:1]
                found.append(image if job.architecture.scales else _some_patches(image, job, len(chosen), random))
                captions += [one.record.caption] if one.record.caption else []
    if not found:
        raise UserError(f"{_CODEBOOK}: none of {len(chosen)} records of the source has an image that can be read")
    return np.concatenate(found), captions, len(found)


def _some_patches(image: np.ndarray, job: TokenizingJob, images: int, random: np.random.Generator) -> np.ndarray:
    patch = job.settings.patch
    patches = patches_of(image, patch).reshape(-1, patch, patch, 3)
    return patches[random.permutation(len(patches))[: -(-PATCHES // images)]]


def _codebook(job: TokenizingJob, pixels: np.ndarray) -> PatchCodebook | PyramidCodebook:
    """Fit a codebook to patches, or to the images for a pyramid."""
    settings, scales = job.settings, job.architecture.scales
    patches = patches_of(pixels, settings.patch).reshape(-1, settings.patch**2) if scales else pixels
    different = len(np.unique(patches.reshape(len(patches), -1), axis=0))
    if different < settings.fit_codebook:
        raise UserError(
            f"{_CODEBOOK}: {settings.fit_codebook} codes, but the images have only {different} different patches of "
            f"{settings.patch} x {settings.patch} pixels; give at most so many"
        )
    if scales:
        return PyramidCodebook.fit(pixels, settings.fit_codebook, settings.patch, scales, SEED)
    return PatchCodebook.of_patches(patches, settings.fit_codebook, SEED)


def _wait_for(folder: Path, job: TokenizingJob) -> None:
    waited_until = time.monotonic() + _WAIT_SECONDS
    while not folder.exists():
        if time.monotonic() > waited_until or job.settings.output.exists():
            raise UserError(f"{OPTION}: {folder} does not appear; is process 0 of this job on the same file system?")
        time.sleep(_POLL_SECONDS)
