"""Emu3's sequence, token by token."""

import numpy as np
import pytest

from megatron_cca.errors import UserError
from megatron_cca.models.emu3 import EMU3_VOCABULARY, tiny_vocabulary


def test_a_small_image_by_hand():
    v = tiny_vocabulary()
    prompt = v.prompt(np.array([5, 6]), np.array([1, 2, 3]))
    image = v.image(np.array([[[7, 8, 9], [0, 1, 127]]], dtype=np.uint16))
    assert prompt.tolist() == [v.bos, 5, 6, v.boi, 1, 2, 3, v.img]
    start = v.visual_start
    assert image.tolist() == [
        *(start + 7, start + 8, start + 9, v.eol),
        *(start, start + 1, start + 127, v.eol),
        *(v.eof, v.eoi, v.eos),
    ]
    assert v.is_visual(image).tolist() == [True, True, True, False, True, True, True, False, False, False, False]
    assert len(prompt) + len(image) == v.sequence_length(2, 3, 2, 3)


def test_a_small_clip_by_hand():
    v = tiny_vocabulary()
    clip = v.image(np.array([[[7, 8]], [[9, 0]]]))
    start = v.visual_start
    assert clip.tolist() == [start + 7, start + 8, v.eol, v.eof, start + 9, start, v.eol, v.eof, v.eoi, v.eos]
    assert len(clip) + len(v.prompt(np.array([5]), np.array([1]))) == v.sequence_length(1, 1, 1, 2, frames=2)


def test_no_caption_or_control_token_counts_as_visual():
    v = tiny_vocabulary()
    assert v.is_visual(np.arange(v.size)).tolist() == [False] * v.visual_start + [True] * v.codebook_size


def test_what_stands_between_boi_and_img():
    assert tiny_vocabulary().meta_text(1, 90, 68) == "90*68"
    assert tiny_vocabulary().meta_text(2, 90, 68) is None
    assert tiny_vocabulary().meta_text(1, 3, 4, "{frames}") == "3*4"
    assert tiny_vocabulary().meta_text(2, 3, 4, "{frames} frames, {height}*{width}") == "2 frames, 3*4"


@pytest.mark.parametrize("template", ["{seconds}", "{", "{0}", "{frames.real.x}", "{frames!q}", "{frames:z}"])
def test_a_template_with_other_fields_is_refused(template):
    with pytest.raises(UserError, match=r"the fields of a clip's meta text are \{frames\}, \{height\}, \{width\}"):
        tiny_vocabulary().meta_text(2, 3, 4, template)


def test_forced_tokens_are_what_an_image_writes():
    v = tiny_vocabulary()
    image = v.image(np.zeros((1, 4, 3), dtype=int))
    mask = v.is_visual(image)
    forced = v.forced_tokens(4, 3)
    assert (forced[~mask] == image[~mask]).all()
    assert (forced[mask] == -1).all()


def test_emu3s_released_numbers():
    v = EMU3_VOCABULARY
    image = v.image(np.full((1, 90, 90), 32_767, dtype=np.uint16))
    assert (len(image), int(v.is_visual(image).sum())) == (8100 + 90 + 3, 8100)
    assert image.max() == v.size - 1 == 184_621
    assert v.visual_start + v.codebook_size == v.size


def test_vocabularies_are_told_apart():
    assert tiny_vocabulary().fingerprint() == tiny_vocabulary().fingerprint()
    assert tiny_vocabulary().fingerprint() != tiny_vocabulary(codebook_size=64).fingerprint()
    assert tiny_vocabulary().fingerprint() != EMU3_VOCABULARY.fingerprint()


def test_vocabularies_are_those_of_shards_that_users_have():
    assert EMU3_VOCABULARY.fingerprint() == "5648904040e85dbe"
    assert tiny_vocabulary().fingerprint() == "1aa32defc4cacfa7"
