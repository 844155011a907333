"""Rows of a step: the same for every cut of the global batch, and each with the right image under the right caption."""

import numpy as np
import pytest
import torch

from megatron_cca.data.microbatches import BatchBuilder
from megatron_cca.data.shards import TokenShards
from megatron_cca.errors import UserError
from megatron_cca.models.emu3.vocabulary import tiny_vocabulary

VOCABULARY = tiny_vocabulary()


@pytest.fixture(scope="module")
def shards(digit_shards):
    return TokenShards(digit_shards, VOCABULARY)


def builder(shards, **changes):
    settings = {
        "with_pairs": True,
        "global_batch_size": 16,
        "micro_batch_size": 4,
        "condition_dropout": 0.2,
        "seed": 7,
        "sequence_multiple": 1,
        "max_sequence_length": 128,
    }
    return BatchBuilder(shards=shards, **{**settings, **changes})


def all_rows(batches, data_parallel_size, step=2):
    """Positive tokens, negative tokens and flags of the global batch, in order."""
    parts = [batches.build(step, rank, data_parallel_size) for rank in range(data_parallel_size)]
    microbatches = [microbatch for part in parts for microbatch in part.microbatches]
    positives, negatives = zip(*(microbatch.tokens.chunk(2) for microbatch in microbatches), strict=True)
    flags = torch.cat([microbatch.negative_is_positive for microbatch in microbatches])
    return torch.cat(positives), torch.cat(negatives), flags


@pytest.mark.parametrize(("micro", "data_parallel"), [(16, 1), (1, 1), (4, 2), (2, 4), (1, 16)])
def test_rows_do_not_depend_on_how_the_batch_is_cut(shards, micro, data_parallel):
    whole = all_rows(builder(shards, micro_batch_size=16), 1)
    cut = all_rows(builder(shards, micro_batch_size=micro), data_parallel)
    for expected, found in zip(whole, cut, strict=True):
        assert torch.equal(expected, found)


def decode(tokens):
    """Caption ids, and visual codes in order, of one row."""
    tokens = tokens.tolist()
    caption = tokens[1 : tokens.index(VOCABULARY.boi)]
    codes = [token - VOCABULARY.visual_start for token in tokens if token >= VOCABULARY.visual_start]
    return caption, codes


def test_each_row_has_its_image_under_its_caption(shards):
    batches = builder(shards)
    batch = batches.pairing(2)
    positives, negatives, flags = all_rows(batches, 1)
    assert batch.condition_dropped.any()
    assert flags.numpy().tolist() == batch.negative_is_positive.tolist()
    for row, (sample, other) in enumerate(zip(batch.sample_ids, batch.negative_ids, strict=True)):
        captions = [shards.caption(sample).tolist(), shards.caption(other).tolist()]
        if batch.condition_dropped[row]:
            captions = [[], []]
        for tokens, caption in zip((positives[row], negatives[row]), captions, strict=True):
            assert decode(tokens) == (caption, shards.codes(sample).reshape(-1).tolist())


def test_the_mask_marks_the_visual_targets_and_nothing_else(shards):
    step = builder(shards).build(0, 0, 1)
    for microbatch in step.microbatches:
        assert torch.equal(microbatch.mask, microbatch.targets >= VOCABULARY.visual_start)
        assert torch.equal(microbatch.tokens[:, 1:], microbatch.targets[:, :-1])
        assert (microbatch.mask.sum(1) == 16).all()
    assert step.mean_num_tokens == 16.0


def test_num_tokens_counts_no_padding(shards):
    step = builder(shards).build(0, 0, 1)
    tokens = torch.cat([microbatch.targets for microbatch in step.microbatches])
    assert step.num_tokens == int((tokens != VOCABULARY.pad).sum())


def test_sequence_length_is_the_longest_row_rounded_up(shards):
    exact = builder(shards).build(0, 0, 1).seq_length
    assert builder(shards, sequence_multiple=16).build(0, 0, 1).seq_length == -(-exact // 16) * 16


def test_without_pairs_there_is_one_row_a_sample(shards):
    step = builder(shards, with_pairs=False).build(0, 0, 1)
    assert [microbatch.tokens.size(0) for microbatch in step.microbatches] == [4] * 4


def test_a_sample_beyond_the_positions_is_named(shards):
    with pytest.raises(UserError, match=r"sample \d+ needs \d+ positions, model\.max_position_embeddings is 20"):
        builder(shards, max_sequence_length=20).build(0, 0, 1)


def test_steps_far_ahead_need_no_history(shards):
    late = builder(shards).build(1_000_000, 0, 1)
    assert np.isfinite(late.mean_num_tokens)
