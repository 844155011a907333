"""Pairing against a row-by-row oracle, and the properties that later code relies on."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cca.data.manifest import SAMPLE
from megatron_cca.data.pairing import Pairing, SampleOrder, rolled_negatives


def slow_negative(conditions, row):
    """Walk back from the row, cyclically, to the first that differs from it in everything."""
    size = len(conditions)
    for back in range(1, size):
        other = conditions[(row - back) % size]
        if all(theirs != ours for theirs, ours in zip(other, conditions[row], strict=True)):
            return (row - back) % size
    return None


@settings(max_examples=500, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=24))
def test_rolled_negatives_equal_the_slow_way(conditions):
    captions, names = np.array(conditions).T
    rows, has_negative = rolled_negatives(captions, names)
    for row in range(len(conditions)):
        expected = slow_negative(conditions, row)
        assert has_negative[row] == (expected is not None)
        assert rows[row] == ((row - 1) % len(conditions) if expected is None else expected)


def test_distinct_conditions_are_rolled_by_one():
    rows, has_negative = rolled_negatives(np.arange(5))
    assert rows.tolist() == [4, 0, 1, 2, 3]
    assert has_negative.all()


NUMBER = 1000


def table(samples, captions=50, classes=10, images=NUMBER):
    """Of sample i: caption i % captions, class i % classes, image i % images, and a length that goes with i."""
    rows = np.zeros(len(samples), SAMPLE)
    rows["caption"], rows["condition"] = samples % captions, samples % classes + 10_000
    rows["codes"] = samples % images + 20_000
    rows["grid"] = np.stack([np.ones_like(samples), 1 + samples % 7, np.full_like(samples, 3)], axis=1)
    rows["caption_length"] = samples % 5
    return rows


def pairing(seed=1, rows=table, **changes):
    order = SampleOrder((np.arange(NUMBER),), (1.0,), seed)
    settings = {"global_batch_size": 200, "condition_dropout": 0.1, "length_bucketing": 1} | changes
    return Pairing(order=order, rows=rows, seed=seed, **settings)


@pytest.mark.parametrize("bucketing", [1, 4])
def test_a_batch_is_a_pure_function_of_seed_and_step(bucketing):
    draws = pairing(length_bucketing=bucketing), pairing(length_bucketing=bucketing)
    late, first, again = draws[0].at(10_003), draws[0].at(3), draws[1].at(3)
    other_seed = pairing(seed=2, length_bucketing=bucketing).at(3)
    for name in first.__dataclass_fields__:
        assert (getattr(first, name) == getattr(again, name)).all()
    for other in (late, other_seed):
        assert (first.sample_ids != other.sample_ids).any()
        assert (first.condition_dropped != other.condition_dropped).any()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(0, 2**31), st.integers(1, 60), st.integers(1, 40), st.sampled_from([0.0, 0.3])
)
def test_negatives_share_neither_caption_nor_condition_unless_flagged(step, seed, captions, classes, dropout):
    rows = pairing(seed, lambda samples: table(samples, captions, classes), condition_dropout=dropout).at(step)
    ours, theirs = (table(ids, captions, classes) for ids in (rows.sample_ids, rows.negative_ids))
    different = (ours["caption"] != theirs["caption"]) & (ours["condition"] != theirs["condition"])
    assert (different | rows.negative_is_positive).all()
    assert (rows.negative_is_positive | ~rows.condition_dropped).all()
    # A flag is the exception: a row that is not dropped has it only if the batch holds nothing else.
    for row in np.flatnonzero(rows.negative_is_positive & ~rows.condition_dropped):
        assert ((ours["caption"] == ours["caption"][row]) | (ours["condition"] == ours["condition"][row])).all()


def test_another_caption_of_the_same_image_is_no_negative():
    """As COCO has five captions an image: sample i shows image i % 20."""
    rows = pairing(rows=lambda samples: table(samples, captions=NUMBER, classes=NUMBER, images=20)).at(3)
    assert (rows.sample_ids % 20 != rows.negative_ids % 20).all()
    assert (rows.negative_is_positive == rows.condition_dropped).all()


def test_dropped_rows_are_flagged_and_about_as_many_as_asked_for():
    rows = pairing(condition_dropout=0.3).at(3)
    assert (rows.negative_is_positive == rows.condition_dropped).all()
    assert 0.2 < rows.condition_dropped.mean() < 0.4


def test_a_batch_of_one_condition_is_all_positive():
    rows = pairing(rows=lambda samples: table(samples, classes=1), condition_dropout=0.0).at(3)
    assert rows.negative_is_positive.all()
    assert not rows.condition_dropped.any()


@pytest.mark.parametrize("bucketing", [1, 5])
def test_every_epoch_holds_every_sample_once(bucketing):
    steps = NUMBER // 200
    for epoch in range(3):
        draw = pairing(length_bucketing=bucketing)
        ids = np.concatenate([draw.at(step).sample_ids for step in range(epoch * steps, (epoch + 1) * steps)])
        assert (np.sort(ids) == np.arange(NUMBER)).all()


def padding(draw, steps):
    lengths = [table(draw.at(step).sample_ids) for step in range(steps)]
    lengths = [rows["grid"].prod(axis=1) + rows["caption_length"] for rows in lengths]
    return sum(int((step.max() - step).sum()) for step in lengths)


def test_bucketing_moves_samples_between_the_steps_of_a_window_and_saves_padding():
    plain, bucketed = pairing(global_batch_size=20), pairing(global_batch_size=20, length_bucketing=10)
    for window in range(5):
        steps = range(window * 10, window * 10 + 10)
        both = [np.sort(np.concatenate([draw.at(step).sample_ids for step in steps])) for draw in (plain, bucketed)]
        assert (both[0] == both[1]).all()
    assert padding(bucketed, 50) < padding(plain, 50) / 4


def test_the_rows_of_a_bucketed_step_are_in_the_streams_order():
    draw = pairing(global_batch_size=20, length_bucketing=10)
    place = {sample: position for position, sample in enumerate(draw.order.at(np.arange(200)).tolist())}
    for step in range(10):
        places = [place[sample] for sample in draw.at(step).sample_ids.tolist()]
        assert places == sorted(places)


def test_bucketed_steps_do_not_go_from_short_to_long():
    draw = pairing(global_batch_size=20, length_bucketing=10)
    longest = [int(table(draw.at(step).sample_ids)["grid"][:, 1].max()) for step in range(50)]
    assert any(later < earlier for earlier, later in pairwise(longest[:10]))
    assert len({tuple(longest[start : start + 10]) for start in range(0, 50, 10)}) > 1
