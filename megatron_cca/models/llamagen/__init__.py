"""LlamaGen, class to image (arXiv 2406.06525): the model of the table in the CCA paper. Its token ids and its sizes.

The authors have two tables, of codes and of classes (FoundationVision/LlamaGen, ``gpt.py``). Here they are one.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_cca.models.architecture import Architecture
from megatron_cca.models.class_vocabulary import ClassVocabulary


@dataclass(frozen=True)
class LlamaGenVocabulary(ClassVocabulary):
    """The ids of LlamaGen's codes, row by row, and of its classes."""


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
