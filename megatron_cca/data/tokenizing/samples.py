"""Turn records into tokenised samples: read them, check that they fit the model, decode and encode their images.

A record that is damaged or unusual is skipped with a reason. The source for a model of classes, or of one grid, is made
for that model: if one record does not fit, no record does, or their labels mean something else. That ends the job.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_cca.data.image_headers import DEFAULT_LIMITS, Rejected
from megatron_cca.data.outcomes import (
    Compared,
    PairedSamples,
    Skipped,
    gathered,
    paired,
    skipped_of,
    spread,
)
from megatron_cca.data.resizing import DALI, RESIZINGS, ResizeSteps, centre
from megatron_cca.data.shard_writing import Sample
from megatron_cca.data.sources import Record, Source, Unreadable
from megatron_cca.data.sources.classes import ClassFolders
from megatron_cca.data.sources.source_protocol import Comparison, SomeRecords
from megatron_cca.data.tokenizers import TextTokenizer
from megatron_cca.data.tokenizing import TokenizeSettings
from megatron_cca.errors import UserError
from megatron_cca.models.formats import ImageTokenizer
from megatron_cca.models.image_vocabulary import ImageVocabulary

# How many records are checked before the job begins, and the share of skipped records from which on none is.
_RECORDS_CHECKED = 32
_TOLERANT = 0.5
# Of the side of a crop: FoundationVision/VAR resizes to 288 pixels and crops 256.
_CROPPED_FROM = 9 / 8


@dataclass(frozen=True)
class _Captioned:
    """A record whose caption and image headers are valid."""

    record: Record
    caption: np.ndarray
    resizing: ResizeSteps


@dataclass(frozen=True)
class Prepared:
    """A record whose images are decoded.

    ``pixels`` is uint8 ``[H, W, 3]``, ``[T, H, W, 3]`` for a clip, or ``[C, H, W, 3]`` for C random crops.
    """

    record: Record
    caption: np.ndarray
    pixels: Tensor | None


class SampleMaker:
    """A maker of samples from a source's records. :meth:`prepare` and :meth:`encode` may run in different threads.

    Args:
        source: the records.
        vocabulary: the model's.
        image_tokenizer: None where the source holds codes.
        text_tokenizer: for captions. None where captions are classes, or not wanted yet.
        device: of decoded images.
        settings: of the job.
        grid: height and width of the only grid that the model takes. None where it takes any.

    Raises:
        UserError: DALI is wanted and not installed.
    """

    def __init__(
        self,
        source: Source,
        vocabulary: ImageVocabulary,
        image_tokenizer: ImageTokenizer | None,
        text_tokenizer: TextTokenizer | None,
        device: torch.device,
        settings: TokenizeSettings,
        grid: tuple[int, int] | None = None,
    ) -> None:
        self._source, self._vocabulary, self._settings, self._grid = source, vocabulary, settings, grid
        self._images, self._text = image_tokenizer, text_tokenizer
        self._pool = ThreadPoolExecutor(settings.num_threads)
        self._resizing = None
        if image_tokenizer is not None:
            self._resizing = RESIZINGS[settings.resize](device, settings.num_threads, settings.limits)

    def check_some(self, share: float) -> None:
        """Check some records from all over the source, and refuse a source in which none can be used.

        Args:
            share: the share of records that may be skipped. Where it is large, nothing is checked: by chance, all may
                be bad.

        Raises:
            UserError: none of them can be used; names the first, with the reason.
        """
        count = len(self._source)
        if share > _TOLERANT and count > _RECORDS_CHECKED:
            return
        looked = np.unique(np.linspace(0, count - 1, min(count, _RECORDS_CHECKED)).round().astype(int)).tolist()
        first = None
        for index in looked:
            found = self._captioned(index)
            if not isinstance(found, Skipped) or not found.is_fault:
                return
            first = first or found
        leaves = first.reason.endswith("leaves the folder")
        hint = "; copy the files there, or allow the folder where they are by --allow-outside" if leaves else ""
        of = f"the {count} records" if len(looked) == count else f"{len(looked)} records from all of {count}"
        raise UserError(
            f"--source: none of {of} can be used, --max-skipped {share:g} allows {int(share * count)} to be skipped; "
            f"the first, {first.name}: {first.reason}{hint}"
        )

    def prepare(self, records: Sequence[int]) -> list[Prepared | Skipped | Compared]:
        """Read, check and decode records, and return one outcome per index.

        Raises:
            UserError: codes or a class of another model. What is wrong in a whole source is not skipped.
        """
        found = list(self._pool.map(self._captioned, records))
        images = spread(found)
        wanted = [one for one in images if isinstance(one, _Captioned)]
        frames = [frame for one in wanted for frame in one.record.frames]
        steps = [one.resizing for one in wanted for _ in one.record.frames]
        decoded = iter(self._resizing.decode(frames, steps) if frames else ())
        done = [self._with_pixels(one, decoded) if isinstance(one, _Captioned) else one for one in images]
        return gathered(found, done)

    def encode(self, records: Sequence[Prepared | Skipped | Compared]) -> list[Sample | Skipped | PairedSamples]:
        """Encode all images. Images of one size go through the tokenizer together."""
        prepared = spread(records)
        by_shape: dict[tuple, list[int]] = {}
        for place, one in enumerate(prepared):
            if isinstance(one, Prepared) and one.pixels is not None:
                by_shape.setdefault(tuple(one.pixels.shape), []).append(place)
        codes: dict[int, np.ndarray] = {}
        for places in by_shape.values():
            for start in range(0, len(places), self._settings.batch_size):
                batch = places[start : start + self._settings.batch_size]
                pixels = torch.stack([prepared[place].pixels for place in batch])
                codes |= zip(batch, self._encoded(pixels).cpu().numpy(), strict=True)
        samples = [
            one if isinstance(one, Skipped) else self._sample(one, codes.get(place))
            for place, one in enumerate(prepared)
        ]
        return [paired(one) if isinstance(one, Compared) else one for one in gathered(records, samples)]

    def _encoded(self, pixels: Tensor) -> Tensor:
        """Return the codes of images, or ``[N, V, T, h, w]`` of their variants: crops, and then mirror images."""
        crops, flips = self._settings.crops, self._settings.flips
        if not crops and not flips:
            return self._images.encode(pixels)
        views = pixels.unbind(1) if crops else [pixels]
        views = [*views, *(view.flip(-2) for view in views if flips)]
        variants = torch.stack([self._images.encode(view) for view in views], dim=1)
        return variants[:, :, None] if variants.dim() == 4 else variants

    def _captioned(self, index: int) -> _Captioned | Skipped | Compared:
        try:
            record = self._source[index]
        except Unreadable as error:
            return skipped_of(error)
        return self._compared(record) if isinstance(record, Comparison) else self._checked(record)

    def _compared(self, comparison: Comparison) -> Compared | Skipped:
        try:
            # What is wrong with the caption is so for all images, and is said once.
            self._caption(comparison)
        except Rejected as error:
            return Skipped(comparison.name, str(error))
        images = (skipped_of(one) if isinstance(one, Unreadable) else self._checked(one) for one in comparison.images)
        return Compared(tuple(images), comparison.pairs)

    def _checked(self, record: Record) -> _Captioned | Skipped:
        try:
            return _Captioned(record, self._caption(record), self._resize_steps(record))
        except Rejected as error:
            return Skipped(record.name, str(error))

    def _caption(self, record: Record | Comparison) -> np.ndarray:
        if self._vocabulary.num_classes is not None:
            return np.array([class_of(record, self._vocabulary)], dtype=np.int32)
        if self._text is None:
            # A text tokenizer is trained later, on captions such as this.
            return np.empty(0, dtype=np.int32)
        caption = record.caption
        if caption is None:
            raise Rejected("it has no caption")
        try:
            ids = self._text.encode_caption(caption, self._vocabulary.template)
        except UserError as error:
            raise Rejected(f"its caption: {error}") from None
        if not ids or not caption.strip():
            raise Rejected("its caption is empty")
        if len(ids) > self._settings.max_caption_tokens:
            raise Rejected(f"its caption has {len(ids)} tokens, more than {self._settings.max_caption_tokens}")
        return np.array(ids, dtype=np.int32)

    def _resize_steps(self, record: Record) -> ResizeSteps:
        """Return the sizes that the record's images pass through."""
        if record.codes is not None:
            self._check_needs_no_pixels(record.name)
            check_codes(record, self._vocabulary, self._grid)
            return ()
        if self._images is None:
            raise Rejected("it is an image; an image tokenizer is needed for it")
        self._check_clip(len(record.frames))
        sizes = {self._resizing.check_image(frame) for frame in record.frames}
        if len(sizes) > 1:
            raise Rejected(f"its frames differ in size: {sorted(sizes)}")
        if self._grid is not None:
            return self._covering(*sizes.pop())
        try:
            return self._resizing.to_area(*sizes.pop(), self._settings.area, self._images.spatial_factor)
        except ValueError as error:
            raise Rejected(str(error)) from None

    def _covering(self, height: int, width: int) -> ResizeSteps:
        side = round(_CROPPED_FROM * self._side()) if self._settings.crops else self._side()
        plan = self._resizing.to_cover(height, width, side)
        if plan[-1].height * plan[-1].width > DEFAULT_LIMITS.max_pixels:
            raise Rejected(f"it is {width} x {height}, too long to be cut to a square of {self._side()}")
        return plan

    def _check_needs_no_pixels(self, name: str) -> None:
        if self._settings.flips:
            raise UserError(f"--flips: {name} holds codes, which cannot be mirrored; leave it out")
        if self._settings.crops:
            raise UserError(f"--crops: {name} holds codes, which cannot be cropped; leave it out")
        if self._settings.resize != DALI:
            raise UserError(f"--resize: {name} holds codes, which nobody resizes; leave it out")

    def _side(self) -> int:
        """Return height and width, in pixels, of the model's only images, which are square."""
        if self._vocabulary.scales:
            return self._vocabulary.scales[-1] * self._images.spatial_factor
        height, width = self._grid
        assert height == width
        return height * self._images.spatial_factor

    def _check_clip(self, frames: int) -> None:
        if frames == 1:
            return
        if not self._images.temporal_factor:
            raise Rejected(f"a clip of {frames} frames; this image tokenizer takes single images")
        if not frames or frames % self._images.temporal_factor:
            raise Rejected(
                f"a clip of {frames} frames; frames are tokenised in groups of {self._images.temporal_factor}"
            )

    def _with_pixels(self, one: _Captioned, decoded) -> Prepared | Skipped:
        frames = [next(decoded) for _ in one.record.frames]
        for frame in frames:
            if isinstance(frame, Rejected):
                return Skipped(one.record.name, str(frame))
        if not frames:
            return Prepared(one.record, one.caption, None)
        if self._settings.crops:
            return Prepared(one.record, one.caption, self._crops(one.record.name, frames[0]))
        if self._grid is not None:
            frames = [centre(frame, self._side(), self._side()) for frame in frames]
        return Prepared(one.record, one.caption, frames[0] if len(frames) == 1 else torch.stack(frames))

    def _crops(self, name: str, pixels: Tensor) -> Tensor:
        """Return random crops ``[C, side, side, 3]``. The record's name decides where they are, on any machine."""
        generator = np.random.default_rng([*name.encode("utf-8", "surrogateescape")])
        side, count = self._side(), self._settings.crops
        rooms = np.array(pixels.shape[:2]) - side
        places = generator.integers(0, rooms + 1, size=(count, 2)).tolist()
        return torch.stack([pixels[top : top + side, left : left + side] for top, left in places])

    def _sample(self, one: Prepared, codes: np.ndarray | None) -> Sample:
        return Sample(one.record.codes if codes is None else codes, one.caption, one.record.condition)


def class_of(record: Record | Comparison, vocabulary: ImageVocabulary) -> int:
    """Return a record's class, for a model that takes classes.

    Raises:
        UserError: the record has no class, or one beyond the model's.
    """
    if record.label is None:
        hint = '; write its number as "label"' if isinstance(record, Comparison) else ""
        raise UserError(f"--source: {record.name} has no class, and the model takes nothing else{hint}")
    if record.label >= vocabulary.num_classes:
        raise UserError(
            f"--source: {record.name} has the label {record.label}, the model takes 0 to {vocabulary.num_classes - 1}"
        )
    return record.label


def class_notices(source: Source, vocabulary: ImageVocabulary) -> list[str]:
    """Return a notice where a source has fewer class folders than the model has classes.

    It says which classes they become.
    """
    known = vocabulary.num_classes
    source = source.whole if isinstance(source, SomeRecords) else source
    if known is None or not isinstance(source, ClassFolders) or source.num_classes >= known:
        return []
    return [
        f"folders of {source.num_classes} classes, while the model has {known}: they are taken for its first "
        f"{source.num_classes}, in the order of their names"
    ]


def check_codes(record: Record, vocabulary: ImageVocabulary, grid: tuple[int, int] | None) -> None:
    """Refuse codes that are not the model's.

    Args:
        record: with codes.
        vocabulary: the model's.
        grid: height and width of the only one that the model takes. None where it takes any.

    Raises:
        Rejected: wrong codes for a model that takes any grid.
        UserError: wrong codes for a model that takes one grid.
    """
    size = vocabulary.codebook_size
    if grid is None:
        if not record.codes.size or record.codes.max() >= size:
            raise Rejected(f"its codes are not those of a codebook of {size}")
        return
    *_, frames, height, width = record.codes.shape
    if (frames, height, width) != (1, *grid):
        found, own = (_grid_text(one, record.pixels_per_code) for one in ((height, width), grid))
        or_else = f", or, for a model of these, --grid {height} {width}" if (frames, height) == (1, width) else ""
        raise UserError(f"--source: {record.name} has {found}, the model takes {own}; give codes of that size{or_else}")
    if record.codes.max() >= size:
        raise UserError(
            f"--source: {record.name} has codes of another codebook: {record.codes.max()} is beyond the model's {size}"
        )


def _grid_text(grid: tuple[int, int], pixels_per_code: int | None) -> str:
    text = f"{grid[0]} x {grid[1]} codes"
    if pixels_per_code is None:
        return text
    return f"{text} ({grid[0] * pixels_per_code} x {grid[1] * pixels_per_code} pixels)"
