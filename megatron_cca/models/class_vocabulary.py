"""The vocabulary of models whose condition is a class: one id for the class, then the codes, and nothing after them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Self

import numpy as np

from megatron_cca.models.image_vocabulary import ImageVocabulary


@dataclass(frozen=True)
class ClassVocabulary(ImageVocabulary):
    """The codes, then the classes, then the null class, which is the dropped condition.

    Attributes:
        size: number of ids.
        codebook_size: code k of the image tokenizer is id k. Only these are predicted.
        num_classes: class c is id ``codebook_size + c``.
    """

    codebook_size: int
    num_classes: int

    def resized(self, codebook_size: int | None, num_classes: int | None) -> Self:
        """See :class:`Vocabulary`."""
        codes, classes = codebook_size or self.codebook_size, num_classes or self.num_classes
        return dataclasses.replace(self, size=codes + classes + 1, codebook_size=codes, num_classes=classes)

    @property
    def visual_start(self) -> int:
        """The id of code 0."""
        return 0

    @property
    def output_size(self) -> int:
        """See :class:`Vocabulary`."""
        return self.codebook_size

    @property
    def caption_size(self) -> int:
        """The number of classes: a caption is the number of a class."""
        return self.num_classes

    @property
    def null_class(self) -> int:
        """The id that takes the place of a class where the condition is dropped."""
        return self.codebook_size + self.num_classes

    @property
    def pad(self) -> int:
        """The id of the null class, since no id is left for padding.

        No token attends to padding, and none is trained on it.
        """
        return self.null_class

    def meta_text(self, frames: int, height: int, width: int, clip_template: str | None = None) -> str:
        """Return an empty text, since a model has images of one kind."""
        return ""

    def prompt_length(self, caption_length, meta_length):
        """Return 1, with or without a class."""
        # The arguments may be arrays, whose shape the result has.
        return 1 + 0 * (caption_length + meta_length)

    def write_prompt(self, ids: np.ndarray, caption: np.ndarray, meta_ids: np.ndarray) -> None:
        """Write the class, or the null class for an empty caption."""
        ids[0] = self.codebook_size + caption[0] if len(caption) else self.null_class

    def image_length(self, frames, height, width):
        """Return the number of codes."""
        return frames * height * width

    def write_image(self, ids: np.ndarray, codes: np.ndarray) -> None:
        """Write the codes in their order."""
        ids[:] = codes.reshape(-1)

    def forced_tokens(self, height: int, width: int) -> np.ndarray:
        """Return int64, -1 for every code: every token is visual."""
        return np.full(self.image_length(1, height, width), -1, dtype=np.int64)
