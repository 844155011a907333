"""Rows of a step: the same for every cut of the global batch, and each with the right image under the right caption."""

import numpy as np
import pytest
import torch

from megatron_cca.data.microbatches import BatchBuilder
from megatron_cca.data.shard_writing import TokenWriter, merge_shards
from megatron_cca.data.shards import TokenData, TokenShards
from megatron_cca.errors import UserError
from tests.references.token_shards import VOCABULARY, encode_text, pairing, random_samples, token_data, write


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return token_data(tmp_path_factory.mktemp("data"), 60, 45, captions=12)


def builder(data, **changes):
    own = {name: changes.pop(name) for name in ("with_pairs", "micro_batch_size") if name in changes}
    limits = {name: changes.pop(name, value) for name, value in LIMITS.items()}
    return BatchBuilder(data, pairing(data, **changes), **{"with_pairs": True, "micro_batch_size": 4} | own | limits)


LIMITS = {"sequence_multiple": 1, "max_sequence_length": 128}


def all_rows(batches, data_parallel_size, step=2):
    """Positive tokens, negative tokens and flags of the global batch, in order."""
    parts = [batches.build(step, rank, data_parallel_size) for rank in range(data_parallel_size)]
    microbatches = [microbatch for part in parts for microbatch in part.microbatches]
    positives, negatives = zip(*(microbatch.tokens.chunk(2) for microbatch in microbatches), strict=True)
    flags = torch.cat([microbatch.negative_is_positive for microbatch in microbatches])
    return torch.cat(positives), torch.cat(negatives), flags


@pytest.mark.parametrize(("micro", "data_parallel"), [(16, 1), (1, 1), (4, 2), (2, 4), (1, 16)])
def test_rows_do_not_depend_on_how_the_batch_is_cut(data, micro, data_parallel):
    whole = all_rows(builder(data, micro_batch_size=16), 1)
    cut = all_rows(builder(data, micro_batch_size=micro), data_parallel)
    for expected, found in zip(whole, cut, strict=True):
        assert torch.equal(expected, found)


def decode(tokens):
    """Caption ids, meta words, and visual codes in order, of one row."""
    tokens = tokens.tolist()
    boi, img = tokens.index(VOCABULARY.boi), tokens.index(VOCABULARY.img)
    codes = [token - VOCABULARY.visual_start for token in tokens if token >= VOCABULARY.visual_start]
    return tokens[1:boi], tokens[boi + 1 : img], codes


def test_each_row_has_its_image_under_its_caption(data):
    batches = builder(data)
    for step in range(4):
        batch = batches.pairing.at(step)
        positives, negatives, flags = all_rows(batches, 1, step)
        assert flags.numpy().tolist() == batch.negative_is_positive.tolist()
        for row, (sample, other) in enumerate(zip(batch.sample_ids.tolist(), batch.negative_ids.tolist(), strict=True)):
            captions = [data.caption(sample).tolist(), data.caption(other).tolist()]
            if batch.condition_dropped[row]:
                captions = [[], []]
            codes = data.codes(sample)
            words = [ord(letter) for letter in f"{codes.shape[1]}*{codes.shape[2]}"]
            for tokens, caption in zip((positives[row], negatives[row]), captions, strict=True):
                assert decode(tokens) == (caption, words, codes.reshape(-1).tolist())
    assert any(builder(data).pairing.at(step).condition_dropped.any() for step in range(4))


def test_the_mask_marks_the_visual_targets_and_nothing_else(data):
    step = builder(data).build(0, 0, 1)
    samples = builder(data).pairing.at(0).sample_ids
    expected = data.rows(samples)["grid"].prod(axis=1)
    for index, microbatch in enumerate(step.microbatches):
        assert microbatch.tokens.dtype == microbatch.targets.dtype == torch.int64
        assert torch.equal(microbatch.mask, microbatch.targets >= VOCABULARY.visual_start)
        assert torch.equal(microbatch.tokens[:, 1:], microbatch.targets[:, :-1])
        assert microbatch.mask.sum(1).tolist() == 2 * expected[4 * index : 4 * index + 4].tolist()
    assert step.mean_num_tokens == pytest.approx(expected.mean())


def test_rows_are_padded_on_the_right_and_num_tokens_counts_no_padding(data):
    step = builder(data).build(0, 0, 1)
    targets = torch.cat([microbatch.targets for microbatch in step.microbatches])
    is_padding = targets == VOCABULARY.pad
    assert step.num_tokens == int((~is_padding).sum())
    assert torch.equal(is_padding, is_padding.cummax(dim=1).values)
    assert not is_padding.all(dim=0).any()


def test_sequence_length_is_the_longest_row_rounded_up(data):
    exact = builder(data).build(0, 0, 1).seq_length
    assert builder(data, sequence_multiple=16).build(0, 0, 1).seq_length == -(-exact // 16) * 16


def test_without_pairs_there_is_one_row_a_sample(data):
    step = builder(data, with_pairs=False).build(0, 0, 1)
    assert [microbatch.tokens.size(0) for microbatch in step.microbatches] == [4] * 4


def test_a_sample_beyond_the_positions_is_named(data):
    with pytest.raises(UserError, match=r"sample \d+ of .*shards\d needs \d+ positions, model\.max_position.* is 20;"):
        builder(data, max_sequence_length=20).build(0, 0, 1)


def test_clips_without_words_for_their_size_are_refused(tmp_path):
    folder = write(tmp_path / "clips", random_samples(20, clips=True))
    clips = TokenData([TokenShards(folder, VOCABULARY)])
    with pytest.raises(UserError, match="what stands between BOI and IMG of one"):
        builder(clips).plan(0)


def test_clips_with_words_of_their_own_become_rows_with_a_break_after_every_frame(tmp_path):
    samples = random_samples(20, clips=True)
    part = tmp_path / "part"
    part.mkdir()
    with TokenWriter(part, VOCABULARY) as writer:
        for sample in samples:
            writer.add(sample)
    how = (VOCABULARY, encode_text, lambda folder: None, {}, tmp_path / "aside", "{frames}x{height}x{width}")
    merge_shards(tmp_path / "clips", [part], *how)
    clips = TokenData([TokenShards(tmp_path / "clips", VOCABULARY)])
    batches = builder(clips)
    rows = all_rows(batches, 1)[0]
    for sample, row in zip(batches.pairing.at(2).sample_ids.tolist(), rows, strict=True):
        _, words, codes = decode(row)
        assert words == encode_text("2x2x3")
        assert codes == samples[sample].codes.reshape(-1).tolist()
        visual = row.tolist()[row.tolist().index(VOCABULARY.img) + 1 :]
        assert [place for place, token in enumerate(visual) if token == VOCABULARY.eof] == [8, 17]
        assert [place for place, token in enumerate(visual) if token == VOCABULARY.eol] == [3, 7, 12, 16]
    assert batches.build(2, 0, 1).mean_num_tokens == 12.0


def test_steps_far_ahead_need_no_history(data):
    late = builder(data, length_bucketing=8).build(1_000_000, 0, 1)
    assert np.isfinite(late.mean_num_tokens)
