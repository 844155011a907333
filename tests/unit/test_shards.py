"""Shard folders: what is written comes back, and every kind of damage is named."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer

from megatron_cca.data.codebooks import PatchCodebook
from megatron_cca.data.digits import captions_of, ensure_digit_shards, load_scans
from megatron_cca.data.manifest import FILE_NAME as MANIFEST
from megatron_cca.data.manifest import TOKEN_FILES, check_files, read_manifest
from megatron_cca.data.shard_writing import Sample, TokenWriter, merge_shards
from megatron_cca.data.shards import TokenData, TokenShards
from megatron_cca.data.tokenizers import TOKENIZER_FILE
from megatron_cca.errors import UserError
from megatron_cca.models.emu3 import EMU3_VOCABULARY, tiny_vocabulary
from tests.references.token_shards import encode_text, random_samples, write

WITHOUT_PAYLOAD = [name for name in TOKEN_FILES if not name.endswith(".bin")]


@pytest.fixture
def small(tmp_path):
    rng = np.random.default_rng(0)
    samples = [
        Sample(rng.integers(128, size=shape), rng.integers(320, size=length))
        for shape, length in (((2, 3), 4), ((3, 3), 1), ((2, 2, 3), 0))
    ]
    return write(tmp_path / "shards", samples), samples


def open_shards(folder):
    return TokenShards(folder, tiny_vocabulary())


def test_round_trip_of_ragged_samples(small):
    folder, samples = small
    shards = open_shards(folder)
    assert len(shards) == 3
    for index, sample in enumerate(samples):
        assert (shards.codes(index) == sample.codes).all()
        assert (shards.caption(index) == sample.caption).all()
    assert shards.table["caption_length"].tolist() == [4, 1, 0]
    assert shards.table["grid"].tolist() == [[1, 2, 3], [1, 3, 3], [2, 2, 3]]
    assert shards.codes(0).dtype == np.uint16
    assert shards.meta_ids((1, 3, 3)).tolist() == encode_text("3*3")


def test_what_was_read_outlives_the_shards(small):
    folder, samples = small
    shards = open_shards(folder)
    arrays = [shards.codes(0), shards.caption(0)]
    # Else they would point into a file that is no longer mapped.
    assert all(array.base is None or array.base.base is None for array in arrays)
    del shards
    assert (arrays[0] == samples[0].codes).all()


def test_a_clip_trains_only_with_words_that_somebody_chose(small, tmp_path):
    folder, samples = small
    with pytest.raises(UserError, match=r"holds clips \(2x2x3 codes\).*have not published"):
        open_shards(folder).meta_ids((2, 2, 3))
    with TokenWriter(_new(tmp_path / "part"), tiny_vocabulary()) as writer:
        writer.add(samples[2])
        writer.add(samples[0])
    template = "{frames} of {height}*{width}"
    merge_shards(
        tmp_path / "clips",
        [tmp_path / "part"],
        tiny_vocabulary(),
        encode_text,
        lambda f: None,
        {},
        tmp_path / "aside",
        template,
    )
    assert open_shards(tmp_path / "clips").meta_ids((2, 2, 3)).tolist() == encode_text("2 of 2*3")


def _new(folder):
    folder.mkdir()
    return folder


def test_parts_merge_into_what_one_writer_writes(tmp_path):
    samples = random_samples(11)
    whole = write(tmp_path / "whole", samples)
    parts = [_new(tmp_path / f"part{index}") for index in range(3)]
    for part, some in zip(parts, (samples[:4], [], samples[4:]), strict=True):
        with TokenWriter(part, tiny_vocabulary()) as writer:
            for sample in some:
                writer.add(sample)
    merge_shards(
        tmp_path / "merged",
        parts,
        tiny_vocabulary(),
        encode_text,
        lambda folder: None,
        {"source": "parts"},
        tmp_path / "aside",
    )
    for name in TOKEN_FILES:
        assert (tmp_path / "merged" / name).read_bytes() == (whole / name).read_bytes()
    assert read_manifest(tmp_path / "merged")["source"] == "parts"


def test_conditions_are_captions_unless_they_have_a_name(tmp_path):
    one, other = np.array([1, 2]), np.array([2, 1])
    codes = np.zeros((1, 1), int)
    samples = [Sample(codes, one), Sample(codes, other), Sample(codes, one, "crane"), Sample(codes, other, "crane")]
    table = open_shards(write(tmp_path / "shards", samples)).table
    assert table["caption"][0] == table["caption"][2] != table["caption"][1]
    assert table["condition"][0] == table["caption"][0]
    assert table["condition"][2] == table["condition"][3] not in table["caption"]


def test_the_digits_carry_their_own_conditions_and_readers(digit_shards):
    shards = open_shards(digit_shards)
    train, held_out = load_scans()
    assert (len(shards), len(held_out.labels)) == (1437, 360)
    of_label = {int(label): shards.table["condition"][train.labels == label] for label in range(10)}
    assert len({int(ids[0]) for ids in of_label.values()}) == 10
    assert all((ids == ids[0]).all() for ids in of_label.values())
    tokenizer = Tokenizer.from_file(str(digit_shards / TOKENIZER_FILE))
    assert tokenizer.decode(shards.caption(0).tolist()) in captions_of(int(train.labels[0]))
    codebook = PatchCodebook.load(digit_shards)
    assert (shards.codes(5)[0] == codebook.encode(train.images[5:6])[0]).all()
    error = codebook.decode(codebook.encode(held_out.images)).astype(float) - held_out.images
    assert np.abs(error).mean() < 12


def test_digits_of_an_earlier_format_are_tokenised_again(tmp_path):
    folder = _new(tmp_path / "digits")
    (folder / MANIFEST).write_text('{"format_version": 1}')
    assert len(open_shards(ensure_digit_shards(tiny_vocabulary(), folder))) == 1437


@pytest.mark.parametrize("text", ["", "sept écrit à la main", "手写的七", "<|image start|><|extra_203|>", "🙂"])
def test_any_caption_encodes_as_text_and_comes_back(digit_shards, text):
    tokenizer = Tokenizer.from_file(str(digit_shards / TOKENIZER_FILE))
    ids = tokenizer.encode(text).ids
    assert all(0 <= token < tiny_vocabulary().text_size for token in ids)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", TOKEN_FILES)
def test_a_truncated_or_missing_file_is_named(small, name):
    folder, _ = small
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1])
    with pytest.raises(UserError, match=rf"{name} has {len(content) - 1} bytes instead of {len(content)}: it is trunc"):
        open_shards(folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match=rf"{name} is missing"):
        open_shards(folder)


def flip(path, byte, bit=3):
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)


@pytest.mark.parametrize("name", WITHOUT_PAYLOAD)
def test_a_flipped_bit_beside_the_tokens_is_named_at_once(small, name):
    folder, _ = small
    for byte in range(0, (folder / name).stat().st_size, 37):
        flip(folder / name, byte)
        with pytest.raises(UserError, match=rf"data\.path: .*{name} is not what it was"):
            open_shards(folder)
        flip(folder / name, byte)


@pytest.mark.parametrize(("name", "read"), [("codes", "codes"), ("captions", "caption")])
def test_a_flipped_bit_in_the_tokens_is_named_when_they_are_read(small, name, read):
    folder, _ = small
    flip(folder / f"{name}.bin", 1)
    shards = open_shards(folder)
    with pytest.raises(UserError, match=rf"data\.path: .*{name}\.bin: sample 0 is not what was written"):
        getattr(shards, read)(0)
    getattr(shards, read)(1)
    with pytest.raises(UserError, match=rf"{name}\.bin is not what it was"):
        check_files(folder, shards.manifest, thoroughly=True)


def test_other_damage_is_refused_in_one_line(small, tmp_path):
    folder, _ = small
    with pytest.raises(UserError, match="was tokenized for another vocabulary"):
        TokenShards(folder, EMU3_VOCABULARY)
    with pytest.raises(UserError, match=r"data\.path: .*nowhere/manifest\.json is missing; give a folder of token"):
        open_shards(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"validation\.path: .*nowhere/manifest\.json is missing"):
        TokenShards(tmp_path / "nowhere", tiny_vocabulary(), "validation.path")
    whole = json.loads((folder / MANIFEST).read_text())
    damaged = [
        *("{", "[]", "{}", "[" * 10**5, "\x00"),
        *(json.dumps({key: value for key, value in whole.items() if key != left_out}) for left_out in whole),
        *(json.dumps(whole | {key: []}) for key in ("num_samples", "vocabulary", "meta_words", "files")),
        json.dumps(whole | {"meta_words": {"3*3": [1]}}),
        json.dumps(whole | {"meta_words": {"1x3x3": [-1]}}),
        json.dumps(whole | {"meta_words": {"1x3x3": [True]}}),
        json.dumps(whole | {"meta_words": {"1x3x3": 7}}),
        json.dumps(whole | {"files": whole["files"] | {"../../etc/passwd": {"bytes": 1, "sha256": ""}}}),
        json.dumps(whole | {"files": dict.fromkeys(whole["files"], 7)}),
    ]
    for text in damaged:
        (folder / MANIFEST).write_text(text)
        with pytest.raises(UserError, match="is not a shard manifest") as error:
            open_shards(folder)
        assert "\n" not in str(error.value)


def test_a_manifest_of_another_format_is_refused(small):
    folder, _ = small
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "format_version": 99}))
    with pytest.raises(UserError, match="format_version 99"):
        open_shards(folder)


def test_words_beyond_the_text_vocabulary_are_refused(small):
    folder, _ = small
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "meta_words": {"1x3x3": [5, 320]}}))
    with pytest.raises(UserError, match="meta_words has token 320, the text vocabulary is 320"):
        open_shards(folder)


def test_a_manifest_that_counts_wrongly_is_refused(small):
    folder, _ = small
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "num_samples": 2}))
    with pytest.raises(UserError, match=r"samples\.npy does not hold 2 samples"):
        open_shards(folder)


def test_data_without_samples_or_without_captions_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no samples"):
        open_shards(write(tmp_path / "empty", []))
    with pytest.raises(UserError, match="no caption that is not empty"):
        open_shards(write(tmp_path / "mute", [Sample(np.zeros((1, 1), int), np.zeros(0, int))]))


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
    for token in (-1, 320):
        with pytest.raises(UserError, match=rf"sample 0: caption token {token} .* text vocabulary of 320"):
            write(tmp_path / "shards", [Sample(np.zeros((1, 1), int), np.full(1, token))])
    assert not (tmp_path / "shards").exists()


def test_ids_count_through_several_folders(tmp_path):
    folders = [write(tmp_path / str(seed), random_samples(4 + seed, seed)) for seed in range(2)]
    first, second = (open_shards(folder) for folder in folders)
    data = TokenData([first, second], [1.0, 1.0])
    assert len(data) == 9
    assert data.ids(1).tolist() == [4, 5, 6, 7, 8]
    rows = data.rows(np.array([8, 0, 3, 4]))
    assert (rows == np.stack([second.table[4], first.table[0], first.table[3], second.table[0]])).all()
    assert (data.codes(5) == second.codes(1)).all()
    assert (data.caption(3) == first.caption(3)).all()
    assert data.describe(4) == f"sample 0 of {folders[1]}"
    assert len({first.fingerprint(), data.fingerprint(), TokenData([first, second], [1.0, 2.0]).fingerprint()}) == 3
