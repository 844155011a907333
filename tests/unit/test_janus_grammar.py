"""Janus-Pro's sequence, token by token, against the authors' recipe in words."""

import numpy as np
import pytest
from tokenizers import AddedToken

from megatron_cca.config.load import load_config
from megatron_cca.data.tokenizers import text_tokenizer_of, train_tokenizer
from megatron_cca.errors import UserError
from megatron_cca.generation.prompts import Prompt, caption_ids, negative_ids
from megatron_cca.models import resolve_architecture
from megatron_cca.models.architecture import grid_misfit, only_grid
from megatron_cca.models.janus import JANUS_VOCABULARY, tiny_vocabulary

NOTHING = np.empty(0, dtype=np.int64)


def test_a_small_image_by_hand():
    v = tiny_vocabulary()
    assert v.prompt(np.array([5, 6]), NOTHING).tolist() == [128 + 320, 128 + 5, 128 + 6, 128 + 321]
    image = v.image(np.array([[[7, 8, 9], [0, 1, 127]]], dtype=np.uint16))
    assert image.tolist() == [7, 8, 9, 0, 1, 127]
    assert v.is_visual(image).all()
    assert v.sequence_length(2, 0, 2, 3) == 10
    assert (v.forced_tokens(2, 3) == -1).all()
    assert v.is_visual(np.arange(v.size)).tolist() == [True] * 128 + [False] * 323


def test_released_numbers():
    v = JANUS_VOCABULARY
    assert (v.size, v.caption_size, v.output_size, v.text_size) == (118_784, 102_400, 16_384, 100_000)
    assert (v.pad - v.codebook_size, v.bos, v.boi) == (100_002, 100_000, 100_016)


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level tokenizer with words for the authors' marks, as a folder of the released weights has them."""
    whole = train_tokenizer(["a red fox on a hill"], 300)
    whole.add_special_tokens([AddedToken(name, special=True) for name in ("<|User|>", "<|Assistant|>")])
    return whole


def test_prompts_are_those_of_the_authors_program(tokenizer):
    """They encode the whole conversation, and blank all but the first and the last id of the unconditional one."""
    text, v = text_tokenizer_of(tokenizer), JANUS_VOCABULARY
    conversation = "<|User|>: a red fox\n\n<|Assistant|>:"
    ids = np.array([v.bos, *tokenizer.encode(conversation).ids, v.boi])
    unconditional = ids.copy()
    unconditional[1:-1] = v.pad_word
    caption = caption_ids(v, text, Prompt("a red fox "))
    assert (v.prompt(caption, NOTHING) - v.codebook_size).tolist() == ids.tolist()
    dropped = negative_ids(v, text, "", len(caption))
    assert (v.prompt(dropped, NOTHING) - v.codebook_size).tolist() == unconditional.tolist()


def test_marks_in_a_caption_are_plain_text(tokenizer):
    found = text_tokenizer_of(tokenizer).encode_caption("<|User|>", tiny_vocabulary().template)
    assert tokenizer.token_to_id("<|User|>") not in found


def test_other_grids_and_clips_are_refused():
    architecture = resolve_architecture(load_config(None, ["model.name=janus-pro-1b"]).model)
    assert only_grid(architecture) == (24, 24)
    assert grid_misfit(architecture, 1, 24, 24) is None
    assert grid_misfit(architecture, 1, 32, 32) == "32 x 32 codes, the model takes 24 x 24 alone"
    assert grid_misfit(architecture, 2, 24, 24) == "2 frames of 24 x 24 codes, the model takes 24 x 24 alone"
    assert tiny_vocabulary().meta_text(2, 4, 4) is None


def test_the_released_codebook_has_one_size():
    with pytest.raises(UserError, match="vocabulary has one size, 118784"):
        resolve_architecture(load_config(None, ["model.name=janus-pro-7b", "model.codebook_size=100"]).model)
    tiny = resolve_architecture(load_config(None, ["model.name=janus-tiny", "model.codebook_size=100"]).model)
    assert (tiny.vocabulary.size, tiny.vocabulary.output_size, tiny.num_words) == (423, 100, 323)


def test_vocabularies_are_told_apart():
    assert tiny_vocabulary().fingerprint() == "7e44118d69f367aa"
    assert JANUS_VOCABULARY.fingerprint() != tiny_vocabulary().fingerprint()
