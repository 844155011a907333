"""LlamaGen, class to image (arXiv 2406.06525): the model of the table in the CCA paper. Its token ids and its sizes.

The authors have two tables, of codes and of classes (FoundationVision/LlamaGen, ``gpt.py``). Here they are one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_cca.models.architecture import Architecture
from megatron_cca.models.image_vocabulary import ImageVocabulary


@dataclass(frozen=True)
class LlamaGenVocabulary(ImageVocabulary):
    """The codes, then the classes, then the null class, which is the dropped condition.

    Attributes:
        size: number of ids.
        codebook_size: code k of the image tokenizer is id k. Only these are predicted.
        num_classes: class c is id ``codebook_size + c``.
    """

    codebook_size: int
    num_classes: int

    def resized(self, codebook_size: int | None, num_classes: int | None) -> LlamaGenVocabulary:
        """See :class:`Vocabulary`."""
        return class_vocabulary(codebook_size or self.codebook_size, num_classes or self.num_classes)

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
        """Return an empty text, since a model has a single grid."""
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
        """Write the codes row by row."""
        ids[:] = codes.reshape(-1)

    def forced_tokens(self, height: int, width: int) -> np.ndarray:
        """Return int64 ``[H * W]``, -1 everywhere: every token is visual."""
        return np.full(height * width, -1, dtype=np.int64)


def class_vocabulary(codebook_size: int, num_classes: int) -> LlamaGenVocabulary:
    """Return the vocabulary of a codebook and so many classes, the null class not counted."""
    return LlamaGenVocabulary(codebook_size + num_classes + 1, codebook_size, num_classes)


IMAGENET_VOCABULARY = class_vocabulary(codebook_size=16_384, num_classes=1000)


# The class, then the codes of the image: 24 x 24 of 384 pixels, 16 x 16 (model.max_position_embeddings: 257) of 256.
PREFIX_TOKENS = 1
_POSITIONS = PREFIX_TOKENS + 24 * 24
_FFN_MULTIPLE = 256


def _ffn_hidden_size(hidden_size: int) -> int:
    """Return two thirds of four times the width, rounded up to the next multiple."""
    return -(-(8 * hidden_size // 3) // _FFN_MULTIPLE) * _FFN_MULTIPLE


def _sized(
    num_layers: int,
    hidden_size: int,
    num_attention_heads: int,
    *,
    ffn_hidden_size: int | None = None,
    max_position_embeddings: int = _POSITIONS,
    vocabulary: LlamaGenVocabulary = IMAGENET_VOCABULARY,
) -> Architecture:
    return Architecture(
        num_layers=num_layers,
        hidden_size=hidden_size,
        ffn_hidden_size=ffn_hidden_size or _ffn_hidden_size(hidden_size),
        num_attention_heads=num_attention_heads,
        num_query_groups=num_attention_heads,
        max_position_embeddings=max_position_embeddings,
        layernorm_epsilon=1e-5,
        rotary_base=10_000,
        vocabulary=vocabulary,
        position_embedding="rope_2d",
        prefix_tokens=PREFIX_TOKENS,
    )


# The sizes that the authors published.
RELEASED = ("llamagen-b", "llamagen-l", "llamagen-xl", "llamagen-xxl", "llamagen-3b")
PRESETS = {
    "llamagen-b": _sized(12, 768, 12),
    "llamagen-l": _sized(24, 1024, 16),
    "llamagen-xl": _sized(36, 1280, 20),
    "llamagen-xxl": _sized(48, 1536, 24),
    "llamagen-3b": _sized(24, 3200, 32),
    "llamagen-tiny": _sized(
        4,
        64,
        4,
        ffn_hidden_size=176,
        max_position_embeddings=PREFIX_TOKENS + 4 * 4,
        vocabulary=class_vocabulary(codebook_size=128, num_classes=10),
    ),
}
