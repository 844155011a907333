"""The loader hands over what the builder builds, however far it reads ahead, and says what went wrong when asked."""

import threading

import pytest
import torch

from megatron_cca.data.loader import BatchLoader, RankShare, SequenceFeed
from megatron_cca.data.microbatches import BatchBuilder
from megatron_cca.data.shards import TokenData, TokenShards
from megatron_cca.errors import UserError
from tests.references.token_shards import VOCABULARY, pairing, token_data

CPU = torch.device("cpu")
TENSORS = ("tokens", "targets", "mask", "negative_is_positive")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return token_data(tmp_path_factory.mktemp("data"), 60, 45, captions=12)


def builder(data):
    return BatchBuilder(data, pairing(data), True, 4, 1, 128)


def assert_same(found, expected):
    assert (found.seq_length, found.num_tokens) == (expected.seq_length, expected.num_tokens)
    assert found.mean_num_tokens == expected.mean_num_tokens
    for ours, theirs in zip(found.microbatches, expected.microbatches, strict=True):
        for name in TENSORS:
            assert getattr(ours, name).dtype == getattr(theirs, name).dtype
            assert torch.equal(getattr(ours, name), getattr(theirs, name))


@pytest.fixture(params=["dali", "torch"])
def kind(request):
    if request.param == "dali":
        pytest.importorskip("nvidia.dali")
    return request.param


@pytest.mark.parametrize("prefetch", [1, 2, 7])
@pytest.mark.parametrize("place", [RankShare(), RankShare(1, 2)])
def test_batches_are_the_builders_for_any_depth(data, prefetch, place, kind):
    batches = builder(data)
    with BatchLoader(batches, place, CPU, prefetch, kind) as loader:
        assert loader.loader == kind
        # In order, then as a resumed run would ask, then back.
        for step in (0, 1, 2, 3, 1_000_000, 1_000_001, 1):
            expected = batches.build(step, place.data_parallel_rank, place.data_parallel_size)
            assert_same(loader.get(step), expected)


def test_a_batch_stays_what_it_was_while_later_ones_are_read(data, kind):
    batches = builder(data)
    with BatchLoader(batches, RankShare(), CPU, 2, kind) as loader:
        kept = [loader.get(step) for step in range(6)]
    for step, batch in enumerate(kept):
        assert_same(batch, batches.build(step, 0, 1))


def test_a_rank_between_the_ends_of_the_pipeline_reads_nothing(data, monkeypatch):
    monkeypatch.setattr(TokenShards, "codes", None)
    batches = builder(data)
    with BatchLoader(batches, RankShare(needs_tokens=False), CPU, 2) as loader:
        batch = loader.get(3)
    assert all(microbatch.tokens is None for microbatch in batch.microbatches)
    assert batch.seq_length == batches.plan(3).seq_length
    assert torch.cat([microbatch.negative_is_positive for microbatch in batch.microbatches]).numel() == 16


def test_nothing_is_left_running(data, kind):
    before = threading.active_count()
    loader = BatchLoader(builder(data), RankShare(), CPU, 3, kind)
    loader.get(0)
    assert threading.active_count() == before + 1
    loader.close()
    assert threading.active_count() == before
    loader.close()


def test_damage_is_reported_at_the_step_that_meets_it_and_not_before(tmp_path, kind):
    data = token_data(tmp_path, 64)
    path = data.shards[0].folder / "codes.bin"
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    data = TokenData([TokenShards(data.shards[0].folder, VOCABULARY)])
    batches = builder(data)
    bad = next(step for step in range(4) if 0 in batches.pairing.at(step).sample_ids)
    with BatchLoader(batches, RankShare(), CPU, 8, kind) as loader:
        for step in range(bad):
            loader.get(step)
        with pytest.raises(UserError, match=r"codes\.bin: sample 0 is not what was written"):
            loader.get(bad)


def test_a_feed_keeps_turns_in_order_and_hands_errors_over(kind):
    def source(turn):
        if turn == 3:
            raise KeyError("turn 3")
        return torch.full((2, turn + 1), turn, dtype=torch.int32).numpy()

    feed = SequenceFeed(source, rows=2, device=CPU, depth=2, loader=kind)
    for turn in range(3):
        assert torch.equal(feed.next(), torch.full((2, turn + 1), turn))
    with pytest.raises(KeyError, match="turn 3"):
        feed.next()
    feed.close()
