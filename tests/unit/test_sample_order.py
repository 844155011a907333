"""The stream of samples: epochs, blends and held-out samples, against what a reader with memory would do."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cca.data.pairing import BLOCK, SampleOrder, held_out_order, training_order
from megatron_cca.errors import UserError
from tests.references.token_shards import token_data


def order(*sizes, weights=None, seed=3):
    starts = np.cumsum([0, *sizes])
    pools = tuple(np.arange(start, start + size) for start, size in zip(starts, sizes, strict=False))
    return SampleOrder(pools, tuple(weights or [1.0] * len(sizes)), seed)


@pytest.mark.parametrize("size", [1, 5, 97])
def test_every_epoch_of_one_pool_is_a_new_permutation(size):
    stream = order(size).at(np.arange(size * 6)).reshape(6, size)
    assert (np.sort(stream, axis=1) == np.arange(size)).all()
    assert size < 5 or (stream[0] != stream[1]).any()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=4), st.data())
def test_any_part_of_the_stream_is_the_same_as_reading_on(sizes, data):
    weights = data.draw(st.lists(st.floats(0.05, 1), min_size=len(sizes), max_size=len(sizes)))
    stream = order(*sizes, weights=weights)
    whole = stream.at(np.arange(3 * BLOCK // 2))
    start = data.draw(st.integers(0, len(whole) - 1))
    stop = data.draw(st.integers(start, len(whole)))
    assert (order(*sizes, weights=weights).at(np.arange(start, stop)) == whole[start:stop]).all()


def test_a_blend_passes_through_each_pool_in_full_and_keeps_its_shares():
    sizes, weights = (50, 700, 3), (0.25, 0.7, 0.05)
    stream = order(*sizes, weights=weights).at(np.arange(4 * BLOCK))
    for start, size, weight in zip((0, 50, 750), sizes, weights, strict=True):
        mine = stream[(stream >= start) & (stream < start + size)] - start
        assert len(mine) == pytest.approx(weight * 4 * BLOCK, abs=4)
        epochs = mine[: len(mine) // size * size].reshape(-1, size)
        assert (np.sort(epochs, axis=1) == np.arange(size)).all()
    for block in range(4):
        share = (stream[block * BLOCK : (block + 1) * BLOCK] < 50).mean()
        assert share == pytest.approx(0.25, abs=1 / BLOCK)


def test_a_blend_is_mixed_anew_in_every_block():
    stream = order(10, 10).at(np.arange(2 * BLOCK)) < 10
    assert (stream[:BLOCK] != stream[BLOCK:]).mean() == pytest.approx(0.5, abs=0.05)


def test_another_seed_is_another_order_but_the_same_blend():
    sizes, weights = (50, 50), (1.0, 3.0)
    first, other = (order(*sizes, weights=weights, seed=seed).at(np.arange(BLOCK)) for seed in (1, 2))
    assert (first != other).any()
    assert (first < 50).sum() == (other < 50).sum() == BLOCK // 4


def test_held_out_samples_are_never_trained_on_and_do_not_depend_on_the_run(tmp_path):
    data = token_data(tmp_path, 40, 100)
    held = [held_out_order(data, 0.1, 0) for _ in range(2)]
    trained = training_order(data, seed=9, held_out_fraction=0.1, split_seed=0)
    assert [len(pool) for pool in held[0].pools] == [4, 10]
    assert [len(pool) for pool in trained.pools] == [36, 90]
    for kept, out, again in zip(trained.pools, held[0].pools, held[1].pools, strict=True):
        assert not set(kept) & set(out)
        assert (out == again).all()
    assert sorted(np.concatenate([*trained.pools, *held[0].pools])) == list(range(140))
    other = held_out_order(data, 0.1, 1)
    assert any((ours != theirs).any() for ours, theirs in zip(held[0].pools, other.pools, strict=True))


def test_a_folder_has_the_same_held_out_samples_alone_and_in_a_blend(tmp_path):
    alone, blended = token_data(tmp_path / "alone", 40), token_data(tmp_path / "blend", 100, 40)
    assert (held_out_order(alone, 0.2, 0).pools[0] + 100 == held_out_order(blended, 0.2, 0).pools[1]).all()


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_a_split_that_leaves_nothing_is_refused(fraction, tmp_path):
    with pytest.raises(UserError, match=rf"validation\.fraction: {fraction} of the 40 samples in .*shards0 are \d+"):
        training_order(token_data(tmp_path, 40), 0, fraction, 0)


def test_a_weight_too_small_to_be_drawn_is_refused(tmp_path):
    data = token_data(tmp_path, 4, 4, weights=[1.0, 1e-6])
    with pytest.raises(UserError, match=r"data\.path: the weight 1e-06 of .*shards1 is less than 1/8192"):
        training_order(data, 0, 0.0, 0)
