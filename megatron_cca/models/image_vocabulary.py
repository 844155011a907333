"""What the token ids of a model are: their number, and in a model of images which of them means what."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from megatron_cca.errors import UserError


@dataclass(frozen=True)
class Vocabulary:
    """Token ids ``0 .. size - 1``, of which nothing else is known.

    Such a model can be converted, but neither trained on images nor sampled.
    """

    size: int

    @property
    def output_size(self) -> int:
        """How many of the ids, from 0 on, the LM head predicts; the rows behind them are masked, as padding is."""
        return self.size

    def resized(self, codebook_size: int | None, num_classes: int | None) -> Vocabulary:
        """The vocabulary of the same family with other sizes; None leaves one as it is.

        Raises:
            UserError: a family whose vocabulary has one size.
        """
        key = "codebook_size" if codebook_size is not None else "num_classes"
        raise UserError(f"model.{key}: this model's vocabulary has one size, {self.size}; leave the key out")

    def fingerprint(self) -> str:
        """A short hash of the whole layout; shards and models that differ in it do not fit."""
        layout = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(layout.encode()).hexdigest()[:16]


class ImageVocabulary(Vocabulary, ABC):
    """Ids of images and of what they are images of; a family's own is a frozen dataclass below this class.

    Attributes:
        codebook_size: of the image tokenizer.
        visual_start: code k of the image tokenizer is id ``visual_start + k``.
        pad: fills a batch to equal length.
        caption_size: captions, as data hold them, are ids below it: of text, or the number of one class.
        num_classes: how many classes there are; None where captions are text. A class's caption is its number alone,
            and the empty caption, as everywhere, is the dropped condition.
    """

    codebook_size: int
    visual_start: int
    pad: int
    caption_size: int
    num_classes: int | None

    @property
    def released_grid(self) -> tuple[int, int] | None:
        """Height and width, in codes, that the released model draws; None where nobody says."""
        return None

    @abstractmethod
    def meta_text(self, frames: int, height: int, width: int, clip_template: str | None = None) -> str | None:
        """The words that a prompt says of the grid.

        Args:
            frames, height, width: the grid of codes; of a clip, each code frame stands for several of the video.
            clip_template: the words for a clip, with the fields ``{frames}``, ``{height}`` and ``{width}``.

        Returns:
            The text; empty where prompts say nothing of it, None where nobody knows what they say.

        Raises:
            UserError: a template with other fields.
        """

    @abstractmethod
    def prompt_length(self, caption_length, meta_length):
        """Ids of a prompt; of numbers or of arrays."""

    @abstractmethod
    def write_prompt(self, ids: np.ndarray, caption: np.ndarray, meta_words: np.ndarray) -> None:
        """:meth:`prompt` into an existing array of that length."""

    @abstractmethod
    def image_length(self, frames, height, width):
        """Ids behind a prompt; of numbers or of arrays."""

    @abstractmethod
    def write_image(self, ids: np.ndarray, codes: np.ndarray) -> None:
        """:meth:`image` into an existing array of that length."""

    @abstractmethod
    def forced_tokens(self, height: int, width: int) -> np.ndarray:
        """What follows from the grid: int64, as long as an image is, -1 where a visual token is free."""

    def prompt(self, caption: np.ndarray, meta_words: np.ndarray) -> np.ndarray:
        """The ids in front of an image.

        Args:
            caption: int ``[C]``, ids below ``caption_size``; empty for the unconditional prompt.
            meta_words: int ``[G]``, the ids of :meth:`meta_text`.

        Returns:
            int64 ``[prompt_length(C, G)]``.
        """
        ids = np.empty(self.prompt_length(len(caption), len(meta_words)), dtype=np.int64)
        self.write_prompt(ids, caption, meta_words)
        return ids

    def image(self, codes: np.ndarray) -> np.ndarray:
        """The ids behind a prompt.

        Args:
            codes: int ``[T, H, W]``, codebook indices; T is 1 for an image.

        Returns:
            int64 ``[image_length(T, H, W)]``.
        """
        ids = np.empty(self.image_length(*codes.shape), dtype=np.int64)
        self.write_image(ids, codes)
        return ids

    def sequence_length(self, caption_length, meta_length, height, width, frames=1):
        """Ids in a whole sequence, for sizing without building it; of numbers or of arrays."""
        return self.prompt_length(caption_length, meta_length) + self.image_length(frames, height, width)

    @property
    def visual_ids(self) -> range:
        """The ids of the visual tokens."""
        return range(self.visual_start, self.visual_start + self.codebook_size)

    def is_visual(self, ids):
        """Where an array or tensor of ids holds visual tokens: bool, of the same shape."""
        return (ids >= self.visual_start) & (ids < self.visual_start + self.codebook_size)
