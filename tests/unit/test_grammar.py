"""Emu3's sequence, token by token."""

import numpy as np

from megatron_cca.models.emu3.grammar import forced_tokens, grid_text, image_ids, prompt_ids, sequence_length
from megatron_cca.models.emu3.vocabulary import EMU3_VOCABULARY, tiny_vocabulary


def test_a_small_image_by_hand():
    v = tiny_vocabulary()
    prompt = prompt_ids(v, np.array([5, 6]), np.array([1, 2, 3]))
    image, mask = image_ids(v, np.array([[7, 8, 9], [0, 1, 2]]))
    assert prompt.tolist() == [v.bos, 5, 6, v.boi, 1, 2, 3, v.img]
    start = v.visual_start
    assert image.tolist() == [
        *(start + 7, start + 8, start + 9, v.eol),
        *(start, start + 1, start + 2, v.eol),
        *(v.eof, v.eoi, v.eos),
    ]
    assert mask.tolist() == [True, True, True, False, True, True, True, False, False, False, False]
    assert len(prompt) + len(image) == sequence_length(2, 3, 2, 3)


def test_forced_tokens_are_what_image_ids_writes():
    v = tiny_vocabulary()
    image, mask = image_ids(v, np.zeros((4, 4), dtype=int))
    forced = forced_tokens(v, 4, 4)
    assert (forced[~mask] == image[~mask]).all()
    assert (forced[mask] == -1).all()


def test_emu3s_released_numbers():
    v = EMU3_VOCABULARY
    image, mask = image_ids(v, np.full((90, 90), 32_767))
    assert (len(image), int(mask.sum())) == (8100 + 90 + 3, 8100)
    assert image.max() == v.size - 1 == 184_621
    assert grid_text(90, 90) == "90*90"
    assert v.visual_start + v.codebook_size == v.size


def test_vocabularies_are_told_apart():
    assert tiny_vocabulary().fingerprint() == tiny_vocabulary().fingerprint()
    assert tiny_vocabulary().fingerprint() != tiny_vocabulary(codebook_size=64).fingerprint()
    assert tiny_vocabulary().fingerprint() != EMU3_VOCABULARY.fingerprint()
