"""Sets of images for evaluation: a folder, an .npz, megatron-cca generate's output, or the digits.

The format of an .npz is that of OpenAI's evaluator and of the CCA paper's authors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from tqdm import tqdm

from megatron_cca.data.image_headers import Rejected, read_header
from megatron_cca.data.sources import DEFAULTS, SourceOptions, open_source
from megatron_cca.data.sources.external_text import printable, split_of
from megatron_cca.data.sources.folders import LINKED, UnreadFiles, real_folder, walk_files
from megatron_cca.data.sources.idx import recognises, split_of_file
from megatron_cca.errors import UserError, error_context
from megatron_cca.io.external_files import file_below
from megatron_cca.io.file_contents import kind_of_file
from megatron_cca.io.paths import typed_path
from megatron_cca.lab.evaluation import DIGITS, HELD_OUT, WORDS
from megatron_cca.lab.evaluation.archives import NO_IMAGES, PICKLE, Moments, Statistics, read_archive, read_pickle
from megatron_cca.lab.evaluation.shard_images import decoded_shards, is_shard_folder

PROMPTS = "prompts.jsonl"
SUFFIXES = frozenset({".png", ".jpg", ".jpeg"})
_OPAQUE = 255

Rows = Callable[[int], np.ndarray]


@dataclass(frozen=True)
class Listing:
    """The files of a folder.

    ``labels`` int64 ``[N]`` and ``prompts`` exist if each image has one. ``notices`` has one line for each kind of file
    that is not listed.
    """

    folder: Path
    files: list[Path]
    labels: np.ndarray | None = None
    prompts: list[str] | None = None
    notices: tuple[str, ...] = ()


def check_path(path: str | Path) -> None:
    """Refuse a path that cannot be a set of images.

    Nothing is read.

    Raises:
        UserError: names the path and the possible kinds.
    """
    if str(path) in WORDS:
        return
    what = Path(typed_path(str(path)))
    if not what.exists():
        raise UserError(f"{path}: does not exist; give a folder of images, an .npz, {DIGITS} or {HELD_OUT}")
    if what.is_file() and what.suffix.lower() not in (".npz", PICKLE) and split_of_file(what) is None:
        raise UserError(f"{path}: is a file, but no .npz; give a folder of images or an .npz")


def list_folder(folder: Path) -> Listing:
    """List the images of a folder.

    Its ``prompts.jsonl`` gives their order. Without one, it lists the folder and one level below, by name.

    Raises:
        UserError: no images; a damaged line of ``prompts.jsonl`` or one that names a missing file; labels or prompts
            for only some of the images.
    """
    if (folder / PROMPTS).is_file():
        return _listed(folder)
    files = [
        file
        for pattern in ("*", "*/*")
        for file in folder.glob(pattern)
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()
    ]
    notices = _passed_over(folder)
    if not files:
        found = "".join(f"; {line}" for line in notices)
        raise UserError(f"{folder}: holds no PNG or JPEG files, neither there nor one level below{found}")
    return Listing(folder, sorted(files), notices=notices)


def _passed_over(folder: Path) -> tuple[str, ...]:
    """Return notices about files of a folder that are not in the set.

    It does not enter folders that are links.
    """
    found, deeper, unread = [], [], UnreadFiles()
    for name in walk_files(real_folder(folder), unread, strict=False):
        if name.endswith("/"):
            # One level below, links count as folders.
            if name.count("/") > 1:
                unread.add(name, LINKED)
        elif Path(name).suffix.lower() not in SUFFIXES:
            unread.add(name)
        elif name.count("/") > 1:
            deeper.append(name)
        else:
            found.append(name)
    splits = sorted(
        {name.partition("/")[0] for name in found if name.count("/") == 1 and split_of(name.partition("/")[0])}
    )
    together = f"{' and '.join(map(printable, splits))} are taken together as one set" if len(splits) > 1 else ""
    line = unread.line()
    below = (
        f"{len(deeper)} images lie deeper than one level and are not read ({printable(min(deeper))})" if deeper else ""
    )
    return tuple(notice for notice in (together, below, line) if notice)


def _not_listed(files: list[Path]) -> tuple[str, ...]:
    """Return notices about files that a list does not name, and about files that it names twice."""
    named = {os.path.realpath(file) for file in files}
    there = {
        os.path.realpath(file)
        for folder in sorted({file.parent for file in files})
        for file in folder.iterdir()
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
    }
    again, others = len(files) - len(named), sorted(there - named)
    return (
        *((f"{again} lines name an image again, which counts again",) if again else ()),
        *((f"{len(others)} images are not in {PROMPTS} and are not read ({printable(others[0])})",) if others else ()),
    )


def _listed(folder: Path) -> Listing:
    files, labels, prompts = [], [], []
    if (kind := kind_of_file(folder / PROMPTS)) is not None:
        raise UserError(f"{folder / PROMPTS}: is {kind}; it must hold one JSON object a line, in UTF-8")
    for number, line in enumerate((folder / PROMPTS).read_bytes().split(b"\n"), 1):
        if line.strip():
            with error_context(f"{folder / PROMPTS}: line {number}"):
                record = _record(line)
                files.append(file_below(folder, record["file"]))
            labels.append(record.get("label"))
            prompts.append(record.get("prompt"))
    if not files:
        raise UserError(f"{folder / PROMPTS}: lists no images")
    for name, values in (("label", labels), ("prompt", prompts)):
        known = sum(value is not None for value in values)
        if known not in (0, len(values)):
            raise UserError(
                f"{folder / PROMPTS}: {known} of {len(values)} images have a {name}; give it for all or none"
            )
    return Listing(
        folder,
        files,
        np.array(labels, dtype=np.int64) if labels[0] is not None else None,
        prompts if prompts[0] is not None else None,
        _not_listed(files),
    )


def _record(line: bytes) -> dict:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError("is not valid JSON") from None
    if not isinstance(record, dict) or not isinstance(record.get("file"), str):
        raise UserError('must be an object with "file"')
    label, prompt = record.get("label"), record.get("prompt")
    if label is not None and (isinstance(label, bool) or not isinstance(label, int) or not -(2**63) <= label < 2**63):
        raise UserError(f'"label" must be a whole number of 64 bits or null, found {label!r}')
    if prompt is not None and not isinstance(prompt, str):
        raise UserError(f'"prompt" must be a string or null, found {prompt!r}')
    return record


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
        statistics: what the moments of a file without images are of, if it says so.
        moments_of: those of a file without images that names their extractors, by kind.
    """

    images: np.ndarray
    labels: np.ndarray | None = None
    prompts: list[str] | None = None
    moments: Moments | None = None
    notices: tuple[str, ...] = ()
    statistics: Statistics | None = None
    moments_of: Mapping[str, Moments] | None = None


def read_images(path: str | Path, rows: Rows | None = None) -> ImageSet:
    """Read a set of images.

    Many images show a progress bar.

    Args:
        path: a folder of PNG or JPEG files, there or one level below, in the order of their names; a folder with
            ``prompts.jsonl`` from megatron-cca generate, in its order; an ``.npz`` with ``arr_0`` uint8
            ``[N, H, W, 3]`` and perhaps labels in ``arr_1``; a folder of MNIST's IDX files (the training split), or its
            file of images of any split; a shard folder, whose codes are decoded; EDM's ``.pkl`` of mean and covariance;
            or the words ``digits`` (the training scans) and ``digits-held-out``.
        rows: says of so many images which are wanted, bool ``[N]``; None means all. Of a folder the files of others are
            not read, and what stands in their places is not said. Other sets are read whole.

    Raises:
        UserError: names an image or file that is missing, empty, unreadable, or of another size than the others.
    """
    if str(path) in WORDS:
        from megatron_cca.data.digits import load_scans

        scans = load_scans()[str(path) == HELD_OUT]
        return ImageSet(np.repeat(scans.images[..., None], 3, axis=3), scans.labels)
    check_path(path)
    path = Path(typed_path(str(path)))
    split = split_of_file(path) if path.is_file() else None
    if split is not None or recognises(path, DEFAULTS):
        return _of_idx(path.parent if split is not None else path, split)
    if is_shard_folder(path):
        return ImageSet(*decoded_shards(path))
    if path.is_file() and path.suffix.lower() == PICKLE:
        return ImageSet(NO_IMAGES, moments_of=read_pickle(path))
    if path.is_file():
        return ImageSet(*read_archive(path))
    listing = list_folder(path)
    images, transparent = _read_files(listing, rows)
    notices = listing.notices
    if transparent:
        notices += (f"{transparent} of {len(images)} images are transparent in places; alpha is dropped",)
    return ImageSet(images, listing.labels, listing.prompts, notices=notices)


def _of_idx(folder: Path, split: str | None) -> ImageSet:
    found = open_source(folder, "idx", SourceOptions(split=split))
    images = np.repeat(np.asarray(found.images)[..., None], 3, axis=3)
    return ImageSet(images, found.labels.astype(np.int64), notices=tuple(found.notices()))


def _read_files(listing: Listing, rows: Rows | None) -> tuple[np.ndarray, int]:
    """Return the images, and the number of images with transparent pixels."""
    transparent, (first, _) = 0, _decode(listing.files[0])
    images = np.empty((len(listing.files), *first.shape), dtype=np.uint8)
    images[0] = first
    wanted = np.arange(len(images)) if rows is None else np.flatnonzero(rows(len(images)))
    files = [listing.files[place] for place in wanted]
    with (
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        tqdm(total=len(files), unit="image", desc=f"reading {listing.folder.name}", disable=None) as bar,
    ):
        for index, file, decoded in zip(wanted, files, pool.map(_decode, files), strict=True):
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
        raise UserError("reading images needs Pillow; pip install 'megatron-cca[data]'") from None
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
