"""Shard folders: what is written comes back, and every kind of damage is named."""

import json
import shutil

import numpy as np
import pytest

from megatron_cca.data.digits import captions_of, load_scans
from megatron_cca.data.patch_codebook import PatchCodebook
from megatron_cca.data.shards import MANIFEST, Sample, TokenShards, write_shards
from megatron_cca.data.text import load_tokenizer
from megatron_cca.errors import UserError
from megatron_cca.models.emu3.vocabulary import EMU3_VOCABULARY, tiny_vocabulary


def encode_text(text):
    return [ord(letter) for letter in text]


def write(folder, samples):
    write_shards(folder, samples, tiny_vocabulary(), encode_text)
    return folder


@pytest.fixture
def small(tmp_path):
    rng = np.random.default_rng(0)
    samples = [
        Sample(rng.integers(128, size=(height, 3)), rng.integers(320, size=length))
        for height, length in ((2, 4), (3, 1), (2, 0))
    ]
    return write(tmp_path / "shards", samples), samples


def test_round_trip_of_ragged_samples(small):
    folder, samples = small
    shards = TokenShards(folder, tiny_vocabulary())
    assert len(shards) == 3
    for index, sample in enumerate(samples):
        assert (shards.codes(index) == sample.codes).all()
        assert (shards.caption(index) == sample.caption).all()
    assert shards.caption_lengths.tolist() == [4, 1, 0]
    assert shards.grid_words(1) == encode_text("3*3")


def test_without_condition_ids_equal_captions_are_the_same_condition(tmp_path):
    captions = [np.array([1, 2]), np.array([2, 1]), np.array([1, 2])]
    folder = write(tmp_path / "shards", [Sample(np.zeros((1, 1), int), caption) for caption in captions])
    ids = TokenShards(folder, tiny_vocabulary()).condition_ids(np.arange(3))
    assert ids[0] == ids[2] != ids[1]


def test_the_digits_carry_their_own_condition_ids_and_readers(digit_shards):
    shards = TokenShards(digit_shards, tiny_vocabulary())
    train, held_out = load_scans()
    assert (len(shards), len(held_out.labels)) == (1437, 360)
    assert (shards.condition_ids(np.arange(1437)) == train.labels).all()
    tokenizer = load_tokenizer(digit_shards)
    assert tokenizer.decode(shards.caption(0).tolist()) in captions_of(int(train.labels[0]))
    codebook = PatchCodebook.load(digit_shards)
    assert (shards.codes(5) == codebook.encode(train.images[5:6])[0]).all()
    error = codebook.decode(codebook.encode(held_out.images)).astype(float) - held_out.images
    assert np.abs(error).mean() < 12


@pytest.mark.parametrize("text", ["", "sept écrit à la main", "手写的七", "<|image start|><|extra_203|>", "🙂"])
def test_any_caption_encodes_as_text_and_comes_back(digit_shards, text):
    tokenizer = load_tokenizer(digit_shards)
    ids = tokenizer.encode(text).ids
    assert all(0 <= token < tiny_vocabulary().text_size for token in ids)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", ["codes.bin", "codes.idx", "captions.bin", "captions.idx", "grids.npy"])
def test_a_truncated_or_missing_file_is_named(small, name):
    folder, _ = small
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1])
    with pytest.raises(UserError, match=rf"{name} has {len(content) - 1} bytes instead of {len(content)}: it is trunc"):
        TokenShards(folder, tiny_vocabulary())
    (folder / name).unlink()
    with pytest.raises(UserError, match=rf"{name} is missing"):
        TokenShards(folder, tiny_vocabulary())


def test_other_damage_is_refused_in_one_line(small, tmp_path):
    folder, _ = small
    with pytest.raises(UserError, match="was tokenized for another vocabulary"):
        TokenShards(folder, EMU3_VOCABULARY)
    with pytest.raises(UserError, match=r"nowhere/manifest\.json is missing; give a folder of token shards"):
        TokenShards(tmp_path / "nowhere", tiny_vocabulary())
    for text in ("{", "[]", "{}"):
        (folder / MANIFEST).write_text(text)
        with pytest.raises(UserError, match="is not a shard manifest"):
            TokenShards(folder, tiny_vocabulary())


def test_a_manifest_of_a_later_format_is_refused(small):
    folder, _ = small
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "format_version": 99}))
    with pytest.raises(UserError, match="format_version 99"):
        TokenShards(folder, tiny_vocabulary())


def test_an_empty_data_set_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no samples"):
        TokenShards(write(tmp_path / "empty", []), tiny_vocabulary())


def test_an_interrupted_write_leaves_nothing(tmp_path):
    def broken():
        yield Sample(np.zeros((1, 1), int), np.zeros(1, int))
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError):
        write(tmp_path / "shards", broken())
    assert list(tmp_path.iterdir()) == []


def test_codes_outside_the_codebook_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"sample 1: visual code 128 .* codebook of 128"):
        write(
            tmp_path / "shards",
            [Sample(np.zeros((1, 1), int), np.zeros(1, int)), Sample(np.full((1, 1), 128), np.zeros(1, int))],
        )
    with pytest.raises(UserError, match=r"sample 0: caption token 320 .* text vocabulary of 320"):
        write(tmp_path / "shards", [Sample(np.zeros((1, 1), int), np.full(1, 320))])
    assert not (tmp_path / "shards").exists()
    shutil.rmtree(tmp_path)
