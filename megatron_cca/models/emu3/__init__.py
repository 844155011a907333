"""Emu3 (arXiv 2409.18869): text and images in one vocabulary, one decoder. Its token ids and its sizes.

One vocabulary holds text, control and visual tokens (baaivision/Emu3, ``tokenization_emu3.py`` and ``config.json``).
The control tokens behind IMG follow from the grid.

The meta text of an image is the grid, "H*W" (``processing_emu3.py`` and ``train/datasets.py``). For a clip the paper
(arXiv 2409.18869) gives the same order of parts, and a break after every row and every frame. Its meta text holds
resolution, frame rate and duration. No public source gives the words. Users who train on clips have to give them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_cca.errors import UserError
from megatron_cca.models.architecture import Architecture
from megatron_cca.models.image_vocabulary import ImageVocabulary

TINY_TEXT_SIZE = 320
TINY_CODEBOOK_SIZE = 128
CLIP_FIELDS = ("frames", "height", "width")


@dataclass(frozen=True)
class Emu3Vocabulary(ImageVocabulary):
    """The meaning of every id. See :class:`ImageVocabulary` for the methods.

    Attributes:
        size: number of ids.
        text_size: ids of text are below it.
        pad: fills a batch to equal length.
        bos, eos: begin and end of a sequence.
        boi, img, eoi: begin of image (before the grid size in words), begin of the visual tokens, end of image.
        eol, eof: end of a row of visual tokens, end of the frame.
        visual_start, codebook_size: code k of the image tokenizer is id ``visual_start + k``.
    """

    text_size: int
    pad: int
    eol: int
    eof: int
    bos: int
    eos: int
    img: int
    boi: int
    eoi: int
    visual_start: int
    codebook_size: int

    def resized(self, codebook_size: int | None, num_classes: int | None) -> Emu3Vocabulary:
        """See :class:`Vocabulary`. The released one has one size."""
        if self == EMU3_VOCABULARY or num_classes is not None:
            return super().resized(codebook_size, num_classes)
        return tiny_vocabulary(self.text_size, codebook_size)

    @property
    def caption_size(self) -> int:
        """The number of ids of text, since captions are text."""
        return self.text_size

    @property
    def num_classes(self) -> None:
        """None: see :class:`ImageVocabulary`."""
        return None

    @property
    def released_grid(self) -> tuple[int, int] | None:
        """The grid of 720 x 720 pixels. A small model of the same family has none."""
        return (90, 90) if self == EMU3_VOCABULARY else None

    def meta_text(self, frames: int, height: int, width: int, clip_template: str | None = None) -> str | None:
        """See :class:`ImageVocabulary`. Each code frame of a clip stands for four of the video."""
        if frames == 1:
            return f"{height}*{width}"
        if clip_template is None:
            return None
        try:
            return clip_template.format_map({"frames": frames, "height": height, "width": width})
        except (KeyError, IndexError, ValueError, AttributeError, TypeError):
            fields = ", ".join(f"{{{field}}}" for field in CLIP_FIELDS)
            raise UserError(f"{clip_template!r}: the fields of a clip's meta text are {fields}") from None

    def prompt_length(self, caption_length, meta_length):
        """Return the number of ids up to and including IMG."""
        return 3 + caption_length + meta_length

    def write_prompt(self, ids: np.ndarray, caption: np.ndarray, meta_ids: np.ndarray) -> None:
        """Write BOS caption BOI meta IMG."""
        end = 1 + len(caption)
        ids[0] = self.bos
        ids[1:end] = caption
        ids[end] = self.boi
        ids[end + 1 : -1] = meta_ids
        ids[-1] = self.img

    def image_length(self, frames, height, width):
        """Return the number of ids after IMG."""
        return frames * (height * (width + 1) + 1) + 2

    def write_image(self, ids: np.ndarray, codes: np.ndarray) -> None:
        """Write everything after IMG."""
        frames, height, width = codes.shape
        by_frame = ids[:-2].reshape(frames, -1)
        rows = by_frame[:, :-1].reshape(frames, height, width + 1)
        np.add(codes, self.visual_start, out=rows[..., :-1], casting="unsafe", dtype=ids.dtype)
        rows[..., -1] = self.eol
        by_frame[:, -1] = self.eof
        ids[-2:] = self.eoi, self.eos

    def forced_tokens(self, height: int, width: int) -> np.ndarray:
        """Return the ids after IMG, int64 ``[H * (W + 1) + 3]``. Visual tokens are -1."""
        row = np.concatenate([np.full(width, -1, dtype=np.int64), [self.eol]])
        return np.concatenate([np.tile(row, height), [self.eof, self.eoi, self.eos]])


EMU3_VOCABULARY = Emu3Vocabulary(
    size=184_622,
    text_size=151_643,
    pad=151_643,
    eol=151_846,
    eof=151_847,
    bos=151_849,
    eos=151_850,
    img=151_851,
    boi=151_852,
    eoi=151_853,
    visual_start=151_854,
    codebook_size=32_768,
)


def tiny_vocabulary(text_size: int = TINY_TEXT_SIZE, codebook_size: int = TINY_CODEBOOK_SIZE) -> Emu3Vocabulary:
    """Return a vocabulary in Emu3's order (text, control, visual) for small text tokenizers and codebooks."""
    control = ("pad", "eol", "eof", "bos", "eos", "img", "boi", "eoi")
    return Emu3Vocabulary(**tiny_ids(control, text_size, codebook_size))


def tiny_ids(control: Sequence[str], text_size: int, codebook_size: int) -> dict[str, int]:
    """Return sizes and ids of a vocabulary that has ids of text, these ids of control, and visual ones."""
    visual_start = text_size + len(control)
    sizes = {"size": visual_start + codebook_size, "text_size": text_size, "codebook_size": codebook_size}
    ids = {name: text_size + offset for offset, name in enumerate(control)}
    return sizes | ids | {"visual_start": visual_start}


PRESETS = {
    "emu3-8b": Architecture(
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=14336,
        num_attention_heads=32,
        num_query_groups=8,
        max_position_embeddings=9216,
        layernorm_epsilon=1e-5,
        rotary_base=1_000_000,
        vocabulary=EMU3_VOCABULARY,
    ),
    "emu3-tiny": Architecture(
        num_layers=4,
        hidden_size=64,
        ffn_hidden_size=176,
        num_attention_heads=4,
        num_query_groups=2,
        max_position_embeddings=128,
        layernorm_epsilon=1e-5,
        rotary_base=1_000_000,
        vocabulary=tiny_vocabulary(),
    ),
}
