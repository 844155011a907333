"""Emu3's text-to-image sequence: BOS caption BOI "H*W" IMG row EOL row EOL ... EOF EOI EOS.

Only the visual tokens are what the image *is*: the control tokens after IMG follow from the grid, so they are neither
trained on nor sampled but forced.
"""

from __future__ import annotations

import numpy as np

from megatron_cca.models.emu3.vocabulary import Emu3Vocabulary


def grid_text(height: int, width: int) -> str:
    """The grid in words, as Emu3's processor writes it between BOI and IMG."""
    return f"{height}*{width}"


def prompt_ids(vocabulary: Emu3Vocabulary, caption: np.ndarray, grid_words: np.ndarray) -> np.ndarray:
    """Everything up to and including IMG.

    Args:
        vocabulary: the ids of the control tokens.
        caption: int ``[T]`` text ids; empty for the unconditional prompt.
        grid_words: int ``[G]`` text ids of :func:`grid_text`.

    Returns:
        int64 ``[1 + T + 1 + G + 1]``.
    """
    parts = ([vocabulary.bos], caption, [vocabulary.boi], grid_words, [vocabulary.img])
    return np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])


def image_ids(vocabulary: Emu3Vocabulary, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Everything after IMG, and where the visual tokens are.

    Args:
        vocabulary: the ids of the control and visual tokens.
        codes: int ``[H, W]``, codebook indices.

    Returns:
        int64 ids ``[H * (W + 1) + 3]`` and a bool mask of the same length, true at visual tokens.
    """
    height = codes.shape[0]
    rows = np.concatenate(
        [codes.astype(np.int64) + vocabulary.visual_start, np.full((height, 1), vocabulary.eol)], axis=1
    ).reshape(-1)
    ids = np.concatenate([rows, [vocabulary.eof, vocabulary.eoi, vocabulary.eos]])
    return ids, forced_tokens(vocabulary, *codes.shape) < 0


def forced_tokens(vocabulary: Emu3Vocabulary, height: int, width: int) -> np.ndarray:
    """What the grammar dictates after IMG: int64 ``[H * (W + 1) + 3]``, -1 where a visual token is free."""
    row = np.concatenate([np.full(width, -1, dtype=np.int64), [vocabulary.eol]])
    return np.concatenate([np.tile(row, height), [vocabulary.eof, vocabulary.eoi, vocabulary.eos]])


def sequence_length(caption_length: int | np.ndarray, grid_words_length: int, height: int, width: int):
    """Ids in a whole sequence, for sizing without building it."""
    return 3 + caption_length + grid_words_length + height * (width + 1) + 3
