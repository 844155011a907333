"""Captions and conditions of shards as prompts: those of the samples, read one by one."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_cca.data.shard_writing import Sample, write_shards
from megatron_cca.data.shards import TokenShards
from megatron_cca.data.tokenizers import open_text_tokenizer
from megatron_cca.errors import UserError
from megatron_cca.generation.prompts import Prompt, RepeatedPrompts, caption_ids
from megatron_cca.generation.shard_prompts import ShardPrompts
from megatron_cca.models.class_vocabulary import ClassVocabulary
from megatron_cca.models.emu3 import tiny_vocabulary

CLASSES = ClassVocabulary(size=139, codebook_size=128, num_classes=10)
TEXTS = ["a handwritten seven", "sept", "", "a handwritten seven"]
GRIDS = [(4, 4), (2, 3), (4, 4), (2, 3)]


@pytest.fixture(scope="module")
def text(digit_shards):
    return open_text_tokenizer(digit_shards)


@pytest.fixture(scope="module")
def texts(text, tmp_path_factory):
    samples = [
        Sample(np.zeros((1, *grid), np.int64), np.array(text.encode(caption), dtype=np.int64), f"condition {caption}")
        for caption, grid in zip(TEXTS, GRIDS, strict=True)
    ]
    folder = tmp_path_factory.mktemp("texts") / "shards"
    write_shards(folder, samples, tiny_vocabulary(), text.encode, text.save)
    return folder


def test_a_prompt_has_the_ids_condition_and_grid_of_its_sample(texts, text):
    prompts, shards = ShardPrompts(texts, tiny_vocabulary(), keeps_grids=True), TokenShards(texts, tiny_vocabulary())
    assert [prompt.text for prompt in prompts] == [prompt.title for prompt in prompts] == TEXTS
    assert [prompt.ids for prompt in prompts] == [tuple(text.encode(caption)) for caption in TEXTS]
    assert [prompt.grid for prompt in prompts] == GRIDS
    assert [prompt.condition for prompt in prompts] == shards.table["condition"].tolist()
    assert prompts.fingerprint() == shards.fingerprint()
    assert prompts[-1] == prompts[3]
    with pytest.raises(IndexError):
        prompts[4]


def test_the_same_ids_reach_a_model_as_are_there(texts):
    """Not those that the text would have: of a class, too, whose number no caption may change."""
    prompt = Prompt("another text", ids=(5, 6, 7))
    assert caption_ids(tiny_vocabulary(), None, prompt).tolist() == [5, 6, 7]
    assert caption_ids(CLASSES, None, Prompt(None, label=3, ids=(4,))).tolist() == [4]


def test_the_longest_of_each_grid_stand_for_all(texts, text):
    """Longest in ids: a short word that the tokenizer has not seen takes more than a phrase that it has."""
    vocabulary, (seven, sept) = tiny_vocabulary(), (len(text.encode(caption)) for caption in TEXTS[:2])
    assert sept > seven > 0
    longest = ShardPrompts(texts, vocabulary, keeps_grids=True).longest()
    assert sorted((prompt.grid, prompt.text) for prompt in longest) == [((2, 3), "sept"), ((4, 4), TEXTS[0])]
    (only,) = ShardPrompts(texts, vocabulary, keeps_grids=False).longest()
    assert (only.grid, only.text) == (None, "sept")


def test_classes_are_labels(tmp_path):
    samples = [Sample(np.zeros((1, 4, 4), np.int64), np.array(ids, dtype=np.int64)) for ids in ([3], [], [9])]
    write_shards(tmp_path / "shards", samples, CLASSES, None)
    prompts = ShardPrompts(tmp_path / "shards", CLASSES, keeps_grids=True)
    assert [(prompt.title, prompt.label, prompt.ids) for prompt in prompts] == [
        ("class 3", 3, (3,)),
        ("", None, ()),
        ("class 9", 9, (9,)),
    ]
    prompts.check_text_tokenizer(None)


def test_a_condition_is_written_as_it_was_read(texts, text, tmp_path):
    prompts = ShardPrompts(texts, tiny_vocabulary(), keeps_grids=True)
    samples = [Sample(np.ones((1, 4, 4), np.int64), np.array(prompt.ids), prompt.condition) for prompt in prompts]
    write_shards(tmp_path / "again", samples, tiny_vocabulary(), text.encode, text.save)
    one, other = (TokenShards(folder, tiny_vocabulary()).table for folder in (texts, tmp_path / "again"))
    assert one["condition"].tolist() == other["condition"].tolist()
    assert one["caption"].tolist() == other["caption"].tolist()


def test_a_million_images_are_not_held(texts):
    """A list of prompts is as small as what it repeats: one is made when it is asked for."""
    prompts = RepeatedPrompts(ShardPrompts(texts, tiny_vocabulary(), keeps_grids=True), 10**9, seed=1)
    assert len(prompts) == 4 * 10**9
    assert prompts[10**9].text == TEXTS[1]


def test_another_text_tokenizer_is_refused(texts, text):
    prompts = ShardPrompts(texts, tiny_vocabulary(), keeps_grids=True)
    prompts.check_text_tokenizer(text)
    with pytest.raises(UserError) as error:
        prompts.check_text_tokenizer(replace(text, meaning=b"other"))
    assert str(error.value).startswith(f"--like: {texts} has another text tokenizer than the model; give shards that")
