"""Emu3's sequence: BOS caption BOI meta IMG, then row EOL row EOL ... EOF for each frame, then EOI EOS.

Only the visual tokens are what the picture *is*: the control tokens after IMG follow from the grid, so they are neither
trained on nor sampled but forced.

Of an image, the meta text is the grid, "H*W" (baaivision/Emu3, ``processing_emu3.py`` and ``train/datasets.py``). Of a
clip the paper (arXiv 2409.18869) gives the same order of parts, a break after every row and every frame, and that the
meta text holds resolution, frame rate and duration; no public source says in which words, so whoever trains on clips
has to say it (:func:`meta_text`).
"""

from __future__ import annotations

import numpy as np

from megatron_cca.errors import UserError
from megatron_cca.models.emu3.vocabulary import Emu3Vocabulary

CLIP_FIELDS = ("frames", "height", "width")


def grid_text(height: int, width: int) -> str:
    """The grid in words, as Emu3's processor writes it between BOI and IMG."""
    return f"{height}*{width}"


def meta_text(frames: int, height: int, width: int, clip_template: str | None = None) -> str | None:
    """What stands between BOI and IMG.

    Args:
        frames, height, width: the grid of codes; of a clip, each code frame stands for four of the video.
        clip_template: the words for a clip, with the fields ``{frames}``, ``{height}`` and ``{width}``.

    Returns:
        The text, or None for a clip without a template: nobody has published Emu3's.

    Raises:
        UserError: a template with other fields.
    """
    if frames == 1:
        return grid_text(height, width)
    if clip_template is None:
        return None
    try:
        return clip_template.format_map({"frames": frames, "height": height, "width": width})
    except (KeyError, IndexError, ValueError, AttributeError, TypeError):
        fields = ", ".join(f"{{{field}}}" for field in CLIP_FIELDS)
        raise UserError(f"{clip_template!r}: the fields of a clip's meta text are {fields}") from None


def prompt_ids(vocabulary: Emu3Vocabulary, caption: np.ndarray, meta_words: np.ndarray) -> np.ndarray:
    """Everything up to and including IMG.

    Args:
        vocabulary: the ids of the control tokens.
        caption: int ``[C]`` text ids; empty for the unconditional prompt.
        meta_words: int ``[G]`` text ids of :func:`meta_text`.

    Returns:
        int64 ``[1 + C + 1 + G + 1]``.
    """
    ids = np.empty(prompt_length(len(caption), len(meta_words)), dtype=np.int64)
    write_prompt_ids(ids, vocabulary, caption, meta_words)
    return ids


def write_prompt_ids(ids: np.ndarray, vocabulary: Emu3Vocabulary, caption: np.ndarray, meta_words: np.ndarray) -> None:
    """:func:`prompt_ids` into an existing array of that length."""
    end = 1 + len(caption)
    ids[0] = vocabulary.bos
    ids[1:end] = caption
    ids[end] = vocabulary.boi
    ids[end + 1 : -1] = meta_words
    ids[-1] = vocabulary.img


def image_ids(vocabulary: Emu3Vocabulary, codes: np.ndarray) -> np.ndarray:
    """Everything after IMG.

    Args:
        vocabulary: the ids of the control and visual tokens.
        codes: int ``[T, H, W]``, codebook indices; T is 1 for an image.

    Returns:
        int64 ``[T * (H * (W + 1) + 1) + 2]``.
    """
    ids = np.empty(image_length(*codes.shape), dtype=np.int64)
    write_image_ids(ids, vocabulary, codes)
    return ids


def write_image_ids(ids: np.ndarray, vocabulary: Emu3Vocabulary, codes: np.ndarray) -> None:
    """:func:`image_ids` into an existing array of that length."""
    frames, height, width = codes.shape
    by_frame = ids[:-2].reshape(frames, -1)
    rows = by_frame[:, :-1].reshape(frames, height, width + 1)
    np.add(codes, vocabulary.visual_start, out=rows[..., :-1], casting="unsafe", dtype=ids.dtype)
    rows[..., -1] = vocabulary.eol
    by_frame[:, -1] = vocabulary.eof
    ids[-2:] = vocabulary.eoi, vocabulary.eos


def forced_tokens(vocabulary: Emu3Vocabulary, height: int, width: int) -> np.ndarray:
    """What the grammar dictates after an image's IMG: int64 ``[H * (W + 1) + 3]``, -1 where a visual token is free."""
    row = np.concatenate([np.full(width, -1, dtype=np.int64), [vocabulary.eol]])
    return np.concatenate([np.tile(row, height), [vocabulary.eof, vocabulary.eoi, vocabulary.eos]])


def prompt_length(caption_length, meta_words_length):
    """Ids up to and including IMG; of numbers or of arrays."""
    return 3 + caption_length + meta_words_length


def image_length(frames, height, width):
    """Ids after IMG; of numbers or of arrays."""
    return frames * (height * (width + 1) + 1) + 2


def sequence_length(caption_length, meta_words_length, height, width, frames=1):
    """Ids in a whole sequence, for sizing without building it; of numbers or of arrays."""
    return prompt_length(caption_length, meta_words_length) + image_length(frames, height, width)


def is_visual(vocabulary: Emu3Vocabulary, ids):
    """Where an array or tensor of ids holds visual tokens: bool, of the same shape."""
    return (ids >= vocabulary.visual_start) & (ids < vocabulary.visual_start + vocabulary.codebook_size)
