"""Pairing against a row-by-row oracle, and the properties that later code relies on."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cca.data.pairing import global_batch, rolled_negatives, sample_ids


def slow_negative(conditions, row):
    """Walk back from the row, cyclically, to the first different condition."""
    size = len(conditions)
    for back in range(1, size):
        if conditions[(row - back) % size] != conditions[row]:
            return (row - back) % size
    return None


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=24))
def test_rolled_negatives_equal_the_slow_way(conditions):
    rows, has_negative = rolled_negatives(np.array(conditions))
    for row in range(len(conditions)):
        expected = slow_negative(conditions, row)
        assert has_negative[row] == (expected is not None)
        if expected is not None:
            assert rows[row] == expected
        assert 0 <= rows[row] < len(conditions)


def test_distinct_conditions_are_rolled_by_one():
    rows, has_negative = rolled_negatives(np.arange(5))
    assert rows.tolist() == [4, 0, 1, 2, 3]
    assert has_negative.all()


@pytest.mark.parametrize(("num_samples", "batch"), [(10, 4), (7, 7), (5, 12)])
def test_every_epoch_holds_every_sample_once(num_samples, batch):
    steps = 3 * num_samples
    stream = np.concatenate([sample_ids(num_samples, batch, seed=3, step=step) for step in range(steps)])
    whole = stream[: len(stream) // num_samples * num_samples].reshape(-1, num_samples)
    assert (np.sort(whole, axis=1) == np.arange(num_samples)).all()
    assert (whole[0] != whole[1]).any()


def draw(step=3, seed=1, dropout=0.1, batch=200, classes=10):
    return global_batch(
        num_samples=1000,
        condition_ids=lambda samples: samples % classes,
        global_batch_size=batch,
        condition_dropout=dropout,
        seed=seed,
        step=step,
    )


def test_a_batch_is_a_pure_function_of_seed_and_step():
    first, again, other_step, other_seed = draw(), draw(), draw(step=4), draw(seed=2)
    for name in first.__dataclass_fields__:
        assert (getattr(first, name) == getattr(again, name)).all()
    assert (first.sample_ids != other_step.sample_ids).any()
    assert (first.sample_ids != other_seed.sample_ids).any()
    assert (first.condition_dropped != other_step.condition_dropped).any()


def test_negatives_never_share_the_condition_and_dropped_rows_are_flagged():
    batch = draw(dropout=0.3)
    assert (batch.sample_ids % 10 != batch.negative_ids % 10).all()
    assert (batch.negative_is_positive == batch.condition_dropped).all()
    assert 0.2 < batch.condition_dropped.mean() < 0.4


def test_a_batch_of_one_condition_is_all_positive():
    batch = draw(dropout=0.0, classes=1)
    assert batch.negative_is_positive.all()
    assert not batch.condition_dropped.any()
