"""VAR, class to image by next-scale prediction (arXiv 2404.02905): the CCA paper's other model. Ids and sizes."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_cca.models.architecture import Architecture
from megatron_cca.models.class_vocabulary import ClassVocabulary
from megatron_cca.models.pyramid import num_codes


@dataclass(frozen=True)
class VarVocabulary(ClassVocabulary):
    """The ids of VAR's codes, scale by scale and each row by row, and of its classes.

    Attributes:
        scales: sides of the grids of codes that an image consists of, smallest first.
    """

    scales: tuple[int, ...]

    def image_length(self, frames, height, width):
        """Return the number of codes of all scales."""
        # The arguments may be arrays, whose shape the result has.
        return num_codes(self.scales) + 0 * (frames + height + width)


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
    "var-tiny": _sized(3, 48, 4, feature_channels=4, vocabulary=pyramid_vocabulary(256, 10, (1, 2, 4))),
}
