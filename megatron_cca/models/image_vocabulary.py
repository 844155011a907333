"""The interface of a family's vocabulary: how an image and its condition are written in token ids.

A sequence is a prompt, which states the condition, followed by an image. The visual ids of an image are the picture
itself. Only they are trained on and drawn. The other ids of an image, if any, follow from the grid and are forced.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from megatron_cca.errors import UserError


@dataclass(frozen=True)
class PromptTemplate:
    """The words around a caption in a prompt, and what stands in their place where the condition is dropped.

    A text tokenizer's added tokens count where their names stand in these words. In captions they do not.

    Attributes:
        before, after: the words in front of a caption and behind it. A blank is between the first and the caption.
        unconditional: ordinary words in place of all three. None means that the prompt keeps its length, and that
            ``blank`` stands at every place.
        blank: an id below ``caption_size``.
    """

    before: str
    after: str
    unconditional: str | None = None
    blank: int | None = None


@dataclass(frozen=True)
class Vocabulary:
    """Token ids ``0 .. size - 1`` of unknown meaning.

    Such a model can be converted, but neither trained on images nor sampled.
    """

    size: int

    @property
    def output_size(self) -> int:
        """The number of ids, from 0 on, that the LM head predicts.

        The head's rows after them are masked, as padding is.
        """
        return self.size

    def resized(self, codebook_size: int | None, num_classes: int | None) -> Vocabulary:
        """Return the vocabulary of the same family with other sizes. None leaves a size as it is.

        Raises:
            UserError: a family whose vocabulary has one size.
        """
        key = "codebook_size" if codebook_size is not None else "num_classes"
        raise UserError(f"model.{key}: this model's vocabulary has one size, {self.size}; leave the key out")

    def fingerprint(self) -> str:
        """Return a short hash of the whole vocabulary. Shards and models whose hashes differ do not fit."""
        meaning = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(meaning.encode()).hexdigest()[:16]


class ImageVocabulary(Vocabulary, ABC):
    """Token ids of images and of their conditions.

    A family's own vocabulary is a frozen dataclass that inherits from it.

    Attributes:
        codebook_size: of the image tokenizer.
        visual_start: code k of the image tokenizer is id ``visual_start + k``.
        pad: fills a batch to equal length.
        caption_size: ids of captions are below it. A caption is text, or the number of one class.
        text_size: ids of ordinary text are below it, where captions are text. A template's added tokens may be above.
        num_classes: how many classes there are. None where captions are text. A class's caption is its number alone.
            The empty caption is the dropped condition, as everywhere.
        template: the words around captions. None where a prompt has the caption alone, and none where it is dropped.
        scales: sides of the grids of a pyramid, smallest first, if an image is one. Its codes are one row then, scale
            by scale, of height 1. Empty for images of one grid.
    """

    codebook_size: int
    visual_start: int
    pad: int
    caption_size: int
    text_size: int
    num_classes: int | None
    template: PromptTemplate | None = None
    scales: tuple[int, ...] = ()

    @property
    def only_grid(self) -> tuple[int, int] | None:
        """Height and width, in codes, of the only images that prompts can mean. None where they say it."""
        return None

    @property
    def released_grid(self) -> tuple[int, int] | None:
        """Height and width, in codes, of the images that the released model draws. None where that is not known."""
        return None

    @abstractmethod
    def meta_text(self, frames: int, height: int, width: int, clip_template: str | None = None) -> str | None:
        """Return the words in a prompt that state the grid.

        Args:
            frames, height, width: the grid of codes. Each code frame of a clip stands for several frames of the video.
            clip_template: the words for a clip, with the fields ``{frames}``, ``{height}`` and ``{width}``.

        Returns:
            The text. It is empty where prompts do not state the grid, and None where the words are not known.

        Raises:
            UserError: a template with other fields.
        """

    @abstractmethod
    def prompt_length(self, caption_length, meta_length):
        """Return the number of ids of a prompt, for numbers or arrays."""

    @abstractmethod
    def write_prompt(self, ids: np.ndarray, caption: np.ndarray, meta_ids: np.ndarray) -> None:
        """Write what :meth:`prompt` returns into an existing array of that length."""

    @abstractmethod
    def image_length(self, frames, height, width):
        """Return the number of ids after a prompt, for numbers or arrays."""

    @abstractmethod
    def write_image(self, ids: np.ndarray, codes: np.ndarray) -> None:
        """Write what :meth:`image` returns into an existing array of that length."""

    @abstractmethod
    def forced_tokens(self, height: int, width: int) -> np.ndarray:
        """Return the ids of an image that follow from the grid, int64 ``[image_length]``. Visual tokens are -1."""

    def prompt(self, caption: np.ndarray, meta_ids: np.ndarray) -> np.ndarray:
        """Return the ids before an image.

        Args:
            caption: int ``[C]``, ids below ``caption_size``, those of the template included. For the unconditional
                prompt what :meth:`dropped_caption` returns.
            meta_ids: int ``[G]``, the ids of :meth:`meta_text`.

        Returns:
            int64 ``[prompt_length(C, G)]``.
        """
        ids = np.empty(self.prompt_length(len(caption), len(meta_ids)), dtype=np.int64)
        self.write_prompt(ids, caption, meta_ids)
        return ids

    def dropped_caption(self, caption_length: int, unconditional: np.ndarray) -> np.ndarray:
        """Return what stands in a prompt in place of a caption that is dropped.

        Args:
            caption_length: number of ids of that caption.
            unconditional: int ``[U]``, the ids of the template's unconditional words. Empty where there are none.
        """
        if self.template is not None and self.template.blank is not None:
            return np.full(caption_length, self.template.blank, dtype=np.int64)
        return unconditional

    def unconditional_text(self) -> str:
        """Return the ordinary words that stand in place of any caption that is dropped. Mostly there are none."""
        return "" if self.template is None else self.template.unconditional or ""

    def image(self, codes: np.ndarray) -> np.ndarray:
        """Return the ids after a prompt.

        Args:
            codes: int ``[T, H, W]``, codebook indices. T is 1 for an image.

        Returns:
            int64 ``[image_length(T, H, W)]``.
        """
        ids = np.empty(self.image_length(*codes.shape), dtype=np.int64)
        self.write_image(ids, codes)
        return ids

    def sequence_length(self, caption_length, meta_length, height, width, frames=1):
        """Return the number of ids of a whole sequence without building it, for numbers or arrays."""
        return self.prompt_length(caption_length, meta_length) + self.image_length(frames, height, width)

    @property
    def visual_ids(self) -> range:
        """The ids of the visual tokens."""
        return range(self.visual_start, self.visual_start + self.codebook_size)

    def is_visual(self, ids):
        """Return where an array or tensor of ids holds visual tokens, bool of the same shape."""
        return (ids >= self.visual_start) & (ids < self.visual_start + self.codebook_size)
