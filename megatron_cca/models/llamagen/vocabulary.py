"""Image codes and classes in one vocabulary; the authors keep two tables (FoundationVision/LlamaGen, ``gpt.py``)."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_cca.models.vocabulary import Vocabulary


@dataclass(frozen=True)
class LlamaGenVocabulary(Vocabulary):
    """Which id means what: the codes, then the classes, then the null class, which stands for a dropped condition.

    Attributes:
        size: number of ids.
        codebook_size: code k of the image tokenizer is id k. Only these are predicted.
        num_classes: class c is id ``codebook_size + c``.
    """

    codebook_size: int
    num_classes: int

    @property
    def visual_start(self) -> int:
        """The id of code 0."""
        return 0

    @property
    def output_size(self) -> int:
        """See :class:`Vocabulary`."""
        return self.codebook_size


def class_vocabulary(codebook_size: int, num_classes: int) -> LlamaGenVocabulary:
    """The vocabulary of a codebook and so many classes, the null class not counted."""
    return LlamaGenVocabulary(codebook_size + num_classes + 1, codebook_size, num_classes)


IMAGENET_VOCABULARY = class_vocabulary(codebook_size=16_384, num_classes=1000)
