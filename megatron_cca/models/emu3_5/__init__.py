"""Emu3.5 (arXiv 2510.26583): Emu3's vocabulary with more codes, in a prompt with words. Its token ids and its sizes.

The ids are those of the authors' text tokenizer (baaivision/Emu3.5, ``src/tokenizer_emu3_ibq``): text, 208 tokens of
control, then ``emu3_vision_tokens.txt``. The prompt is that of their text to image (``configs/example_config_t2i.py``).
Their sampling has the same image behind the unconditional prompt, with its grid (``src/utils/logits_processor.py``).

Epsilon, rotary base and positions are the defaults of their ``configuration_emu3.py``. An import takes those of the
``config.json`` beside the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_cca.models.architecture import Architecture
from megatron_cca.models.emu3 import EMU3_VOCABULARY, TINY_CODEBOOK_SIZE, TINY_TEXT_SIZE, Emu3Vocabulary, tiny_ids
from megatron_cca.models.image_vocabulary import PromptTemplate, Vocabulary

_TEXT_TO_IMAGE = PromptTemplate(
    before="You are a helpful assistant for t2i task. USER:",
    after=" ASSISTANT: ",
    unconditional="You are a helpful assistant. USER:  ASSISTANT: ",
)
# Its rows are short, and its parts differ as those of the released one do.
_TINY = PromptTemplate(before="t2i:", after=" >", unconditional=": >")


@dataclass(frozen=True)
class Emu35Vocabulary(Emu3Vocabulary):
    """The meaning of every id. See :class:`ImageVocabulary` for the methods.

    EOF and EOS keep Emu3's ids, but no image has them.

    Attributes:
        bss: begin of what the assistant says, before the image.
        template: the words around captions.
    """

    bss: int
    template: PromptTemplate

    def resized(self, codebook_size: int | None, num_classes: int | None) -> Vocabulary:
        """See :class:`Vocabulary`. The released one has one size."""
        if self == EMU3_5_VOCABULARY or num_classes is not None:
            return Vocabulary.resized(self, codebook_size, num_classes)
        return tiny_vocabulary(self.text_size, codebook_size)

    @property
    def released_grid(self) -> tuple[int, int] | None:
        """The grid of 1024 x 1024 pixels. A small model of the same family has none."""
        return (64, 64) if self == EMU3_5_VOCABULARY else None

    def meta_text(self, frames: int, height: int, width: int, clip_template: str | None = None) -> str | None:
        """See :class:`ImageVocabulary`. Clips are no part of this grammar."""
        return f"{height}*{width}" if frames == 1 else None

    def prompt_length(self, caption_length, meta_length):
        """Return the number of ids up to and including IMG."""
        return 4 + caption_length + meta_length

    def write_prompt(self, ids: np.ndarray, caption: np.ndarray, meta_ids: np.ndarray) -> None:
        """Write BOS caption BSS BOI meta IMG, where the caption has the words of the template."""
        end = 1 + len(caption)
        ids[0] = self.bos
        ids[1:end] = caption
        ids[end : end + 2] = self.bss, self.boi
        ids[end + 2 : -1] = meta_ids
        ids[-1] = self.img

    def image_length(self, frames, height, width):
        """Return the number of ids after IMG."""
        return frames * height * (width + 1)

    def write_image(self, ids: np.ndarray, codes: np.ndarray) -> None:
        """Write everything after IMG: EOL stands between rows, and EOI behind the last."""
        *_, width = codes.shape
        rows = ids.reshape(-1, width + 1)
        np.add(codes.reshape(-1, width), self.visual_start, out=rows[:, :-1], casting="unsafe", dtype=ids.dtype)
        rows[:, -1] = self.eol
        ids[-1] = self.eoi

    def forced_tokens(self, height: int, width: int) -> np.ndarray:
        """Return the ids after IMG, int64 ``[H * (W + 1)]``. Visual tokens are -1."""
        row = np.concatenate([np.full(width, -1, dtype=np.int64), [self.eol]])
        return np.concatenate([np.tile(row, height)[:-1], [self.eoi]])


_CODES = 131_072
EMU3_5_VOCABULARY = Emu35Vocabulary(
    **vars(EMU3_VOCABULARY) | {"codebook_size": _CODES, "size": EMU3_VOCABULARY.visual_start + _CODES},
    bss=151_746,
    template=_TEXT_TO_IMAGE,
)


def tiny_vocabulary(text_size: int = TINY_TEXT_SIZE, codebook_size: int = TINY_CODEBOOK_SIZE) -> Emu35Vocabulary:
    """Return a vocabulary in Emu3.5's order (text, control, visual) for small text tokenizers and codebooks."""
    control = ("pad", "bss", "eol", "eof", "bos", "eos", "img", "boi", "eoi")
    return Emu35Vocabulary(**tiny_ids(control, text_size, codebook_size), template=_TINY)


PRESETS = {
    "emu3_5-34b": Architecture(
        num_layers=64,
        hidden_size=5120,
        ffn_hidden_size=25600,
        num_attention_heads=64,
        num_query_groups=8,
        kv_channels=128,
        qk_layernorm=True,
        max_position_embeddings=9216,
        layernorm_epsilon=1e-5,
        rotary_base=1_000_000,
        vocabulary=EMU3_5_VOCABULARY,
    ),
    "emu3_5-tiny": Architecture(
        num_layers=4,
        hidden_size=64,
        ffn_hidden_size=176,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=24,
        qk_layernorm=True,
        max_position_embeddings=128,
        layernorm_epsilon=1e-5,
        rotary_base=1_000_000,
        vocabulary=tiny_vocabulary(),
    ),
}
