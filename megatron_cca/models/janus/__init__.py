"""Janus-Pro (arXiv 2501.17811): a decoder of words that also draws images. Its token ids and its sizes.

The authors have two tables, of codes and of words, and a head for each (deepseek-ai/Janus, ``modeling_vlm.py``). Here
the codes are the first ids, and the words follow. The words' own head does not take part in images. It travels beside
the weights, as the network that understands images does.

A prompt is the authors' chat of one question without an answer, and the begin of an image behind it. Where the
condition is dropped, all ids between the first and the last are padding (``generation_inference.py``).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from megatron_cca.models.architecture import Architecture
from megatron_cca.models.image_vocabulary import ImageVocabulary, PromptTemplate

TINY_TEXT_SIZE = 320
TINY_CODEBOOK_SIZE = 128


@dataclass(frozen=True)
class JanusVocabulary(ImageVocabulary):
    """The codes, then the words. See :class:`ImageVocabulary` for the methods.

    Attributes:
        size: number of ids.
        codebook_size: code k of the image tokenizer is id k. Only these are predicted.
        text_size: words below it are ordinary text.
        bos, boi, pad_word: the words that begin a sequence and an image, and that fill a prompt without a condition.
        side: of the only grid of codes that prompts can mean. 0 stands for any grid.
        template: the words around a caption.
    """

    codebook_size: int
    text_size: int
    bos: int
    boi: int
    pad_word: int
    side: int
    template: PromptTemplate

    def resized(self, codebook_size: int | None, num_classes: int | None) -> JanusVocabulary:
        """See :class:`Vocabulary`. The released one has one size."""
        if self == JANUS_VOCABULARY or num_classes is not None:
            return super().resized(codebook_size, num_classes)
        codes = codebook_size or self.codebook_size
        return dataclasses.replace(self, size=codes + self.caption_size, codebook_size=codes)

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
        """The number of words. A caption has words of text, those of the template, or padding."""
        return self.size - self.codebook_size

    @property
    def num_classes(self) -> None:
        """None: see :class:`ImageVocabulary`."""
        return None

    @property
    def pad(self) -> int:
        """The id of the word of padding."""
        return self.codebook_size + self.pad_word

    @property
    def only_grid(self) -> tuple[int, int] | None:
        """See :class:`ImageVocabulary`."""
        return (self.side, self.side) if self.side else None

    def meta_text(self, frames: int, height: int, width: int, clip_template: str | None = None) -> str | None:
        """Return an empty text for an image, since prompts do not state the grid. There are no clips."""
        return "" if frames == 1 else None

    def prompt_length(self, caption_length, meta_length):
        """Return the number of ids up to and including the begin of the image."""
        return 2 + caption_length + meta_length

    def write_prompt(self, ids: np.ndarray, caption: np.ndarray, meta_ids: np.ndarray) -> None:
        """Write the begin of the sequence, the caption with its template, the begin of the image."""
        ids[0] = self.codebook_size + self.bos
        np.add(caption, self.codebook_size, out=ids[1:-1], casting="unsafe", dtype=ids.dtype)
        ids[-1] = self.codebook_size + self.boi

    def image_length(self, frames, height, width):
        """Return the number of codes."""
        return frames * height * width

    def write_image(self, ids: np.ndarray, codes: np.ndarray) -> None:
        """Write the codes in their order."""
        ids[:] = codes.reshape(-1)

    def forced_tokens(self, height: int, width: int) -> np.ndarray:
        """Return int64, -1 for every code: every token is visual."""
        return np.full(height * width, -1, dtype=np.int64)


def _vocabulary(codes: int, words: int, side: int, before: str, after: str, **ids: int) -> JanusVocabulary:
    template = PromptTemplate(before, after, blank=ids["pad_word"])
    return JanusVocabulary(codes + words, codes, side=side, template=template, **ids)


# The ids of the tokenizer beside the released weights; ordinary text is below the first.
JANUS_VOCABULARY = _vocabulary(
    16_384,
    102_400,
    24,
    "<|User|>:",
    "\n\n<|Assistant|>:",
    text_size=100_000,
    bos=100_000,
    boi=100_016,
    pad_word=100_002,
)


def tiny_vocabulary(text_size: int = TINY_TEXT_SIZE, codebook_size: int = TINY_CODEBOOK_SIZE) -> JanusVocabulary:
    """Return a vocabulary like Janus's for small text tokenizers and codebooks, with shorter words around captions."""
    ids = {"text_size": text_size, "bos": text_size, "boi": text_size + 1, "pad_word": text_size + 2}
    return _vocabulary(codebook_size, text_size + 3, 0, "user:", "\n:", **ids)


def _sized(
    num_layers: int,
    hidden_size: int,
    ffn_hidden_size: int,
    num_attention_heads: int,
    *,
    max_position_embeddings: int = 16_384,
    vocabulary: JanusVocabulary = JANUS_VOCABULARY,
) -> Architecture:
    return Architecture(
        num_layers=num_layers,
        hidden_size=hidden_size,
        ffn_hidden_size=ffn_hidden_size,
        num_attention_heads=num_attention_heads,
        num_query_groups=num_attention_heads,
        max_position_embeddings=max_position_embeddings,
        layernorm_epsilon=1e-6,
        rotary_base=10_000,
        vocabulary=vocabulary,
        image_embedding_channels=8,
    )


PRESETS = {
    "janus-pro-1b": _sized(24, 2048, 5632, 16),
    "janus-pro-7b": _sized(30, 4096, 11_008, 32),
    "janus-tiny": _sized(4, 64, 176, 4, max_position_embeddings=128, vocabulary=tiny_vocabulary()),
}
