"""VAR, class to image by next-scale prediction (arXiv 2404.02905): the CCA paper's other model. Ids and sizes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_cca.models.architecture import Architecture
from megatron_cca.models.image_vocabulary import ImageVocabulary


@dataclass(frozen=True)
class VarVocabulary(ImageVocabulary):
    """The codes, then the classes, then the null class, which is the dropped condition.

    Attributes:
        size: number of ids.
        codebook_size: code k of the image tokenizer is id k. Only these are predicted.
        num_classes: class c is id ``codebook_size + c``.
        scales: sides of the grids of codes that an image consists of, smallest first.
    """

    codebook_size: int
    num_classes: int
    scales: tuple[int, ...]

    def resized(self, codebook_size: int | None, num_classes: int | None) -> VarVocabulary:
        """See :class:`Vocabulary`."""
        return pyramid_vocabulary(codebook_size or self.codebook_size, num_classes or self.num_classes, self.scales)

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
        """The id of the null class, since no id is left for padding. Padding is neither seen nor trained on."""
        return self.null_class

    def meta_text(self, frames: int, height: int, width: int, clip_template: str | None = None) -> str:
        """Return an empty text, since a model has a single pyramid."""
        return ""

    def prompt_length(self, caption_length, meta_length):
        """Return 1, with or without a class."""
        # The arguments may be arrays, whose shape the result has.
        return 1 + 0 * (caption_length + meta_length)

    def write_prompt(self, ids: np.ndarray, caption: np.ndarray, meta_ids: np.ndarray) -> None:
        """Write the class, or the null class for an empty caption."""
        ids[0] = self.codebook_size + caption[0] if len(caption) else self.null_class

    def image_length(self, frames, height, width):
        """Return the number of codes of all scales."""
        return num_codes(self.scales) + 0 * (frames + height + width)

    def write_image(self, ids: np.ndarray, codes: np.ndarray) -> None:
        """Write the codes scale by scale, each row by row."""
        ids[:] = codes.reshape(-1)

    def forced_tokens(self, height: int, width: int) -> np.ndarray:
        """Return int64, -1 for every code: every token is visual."""
        return np.full(num_codes(self.scales), -1, dtype=np.int64)


def num_codes(scales: tuple[int, ...]) -> int:
    """Return the number of codes of an image."""
    return sum(side**2 for side in scales)


def pyramid_vocabulary(codebook_size: int, num_classes: int, scales: tuple[int, ...]) -> VarVocabulary:
    """Return the vocabulary of a codebook and so many classes, the null class not counted."""
    return VarVocabulary(codebook_size + num_classes + 1, codebook_size, num_classes, scales)


# The class, then the codes.
PREFIX_TOKENS = 1
# Of 256 pixels, by a tokenizer of 16 pixels per code.
RELEASED_SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
_IMAGENET = pyramid_vocabulary(codebook_size=4096, num_classes=1000, scales=RELEASED_SCALES)


def _sized(
    num_layers: int,
    hidden_size: int,
    num_attention_heads: int,
    *,
    feature_channels: int = 32,
    vocabulary: VarVocabulary = _IMAGENET,
) -> Architecture:
    return Architecture(
        num_layers=num_layers,
        hidden_size=hidden_size,
        ffn_hidden_size=4 * hidden_size,
        num_attention_heads=num_attention_heads,
        num_query_groups=num_attention_heads,
        max_position_embeddings=PREFIX_TOKENS + num_codes(vocabulary.scales),
        layernorm_epsilon=1e-6,
        # Not used: positions are learned.
        rotary_base=10_000,
        vocabulary=vocabulary,
        position_embedding="learned",
        prefix_tokens=PREFIX_TOKENS,
        scales=vocabulary.scales,
        feature_channels=feature_channels,
    )


# The sizes that the authors published at 256 pixels: d layers of d heads of 64 channels.
RELEASED = ("var-d16", "var-d20", "var-d24", "var-d30")
PRESETS = {
    **{f"var-d{depth}": _sized(depth, 64 * depth, depth) for depth in (16, 20, 24, 30)},
    "var-tiny": _sized(3, 48, 4, feature_channels=6, vocabulary=pyramid_vocabulary(40, 10, (1, 2, 4))),
}
