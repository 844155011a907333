"""One vocabulary of text, control and visual tokens (baaivision/Emu3, ``tokenization_emu3.py`` and ``config.json``)."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_cca.models.vocabulary import Vocabulary

TINY_TEXT_SIZE = 320
TINY_CODEBOOK_SIZE = 128


@dataclass(frozen=True)
class Emu3Vocabulary(Vocabulary):
    """Which id means what.

    Attributes:
        size: number of ids.
        text_size: ids below it are text.
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
    """A vocabulary in Emu3's order (text, control, visual) for small text tokenizers and codebooks."""
    control = ("pad", "eol", "eof", "bos", "eos", "img", "boi", "eoi")
    ids = {name: text_size + offset for offset, name in enumerate(control)}
    visual_start = text_size + len(control)
    return Emu3Vocabulary(
        size=visual_start + codebook_size,
        text_size=text_size,
        visual_start=visual_start,
        codebook_size=codebook_size,
        **ids,
    )
