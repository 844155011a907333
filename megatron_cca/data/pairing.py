"""Which samples a step sees, which condition serves each as its negative, which rows drop their condition.

Everything here is a pure function of (data, seed, step) over the *global* batch, computed before any sharding: losses
are then the same for every data-parallel size and micro batch, and a resumed run needs nothing but the step number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

# Keeps the streams of one (seed, step) apart.
_PERMUTATION, _DROPOUT = 0, 1


@dataclass(frozen=True)
class GlobalBatch:
    """The rows of one step, before sharding; arrays of length ``global_batch_size``.

    Attributes:
        sample_ids: int64; the sample whose image (and own caption) the row holds.
        negative_ids: int64; the sample whose caption is the row's negative condition.
        condition_dropped: bool; both conditions of the row are the empty caption.
        negative_is_positive: bool; the row has no true negative: its condition was dropped, or the whole batch has
            one condition.
    """

    sample_ids: np.ndarray
    negative_ids: np.ndarray
    condition_dropped: np.ndarray
    negative_is_positive: np.ndarray


def global_batch(
    *,
    num_samples: int,
    condition_ids: Callable[[np.ndarray], np.ndarray],
    global_batch_size: int,
    condition_dropout: float,
    seed: int,
    step: int,
) -> GlobalBatch:
    """Draw the batch of a step.

    Args:
        num_samples: size of the data set.
        condition_ids: maps sample ids ``[B]`` to integers that are equal where conditions are the same.
        global_batch_size: B.
        condition_dropout: probability that a row's condition is dropped.
        seed: of the run.
        step: counts from 0.
    """
    samples = sample_ids(num_samples, global_batch_size, seed, step)
    negative_rows, has_negative = rolled_negatives(condition_ids(samples))
    dropped = np.random.default_rng((seed, _DROPOUT, step)).random(global_batch_size) < condition_dropout
    return GlobalBatch(
        sample_ids=samples,
        negative_ids=samples[negative_rows],
        condition_dropped=dropped,
        negative_is_positive=dropped | ~has_negative,
    )


def sample_ids(num_samples: int, global_batch_size: int, seed: int, step: int) -> np.ndarray:
    """The samples of a step: a full permutation per epoch, epochs laid end to end; int64 ``[B]``."""
    positions = np.arange(step * global_batch_size, (step + 1) * global_batch_size)
    epochs, offsets = np.divmod(positions, num_samples)
    samples = np.empty_like(positions)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        samples[here] = _epoch_permutation(num_samples, seed, int(epoch))[offsets[here]]
    return samples


@lru_cache(maxsize=2)
def _epoch_permutation(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, _PERMUTATION, epoch)).permutation(num_samples)


def rolled_negatives(conditions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each row's negative: the conditions rolled by one, moving on past those equal to the row's own.

    A roll, not a random permutation: a permutation has fixed points, which bias small batches.

    Args:
        conditions: int ``[B]``, equal where conditions are the same.

    Returns:
        int64 ``[B]``, the row whose condition is the negative, and bool ``[B]``, whether there is a different one.
    """
    size = len(conditions)
    twice = np.concatenate([conditions, conditions])
    # Row i takes the last row before it with another condition: the one in front of its run of equal conditions.
    starts_run = np.ones(2 * size, dtype=bool)
    starts_run[1:] = twice[1:] != twice[:-1]
    run_start = np.maximum.accumulate(np.where(starts_run, np.arange(2 * size), 0))[size:]
    has_negative = np.full(size, bool((conditions != conditions[0]).any()))
    return np.where(has_negative, (run_start - 1) % size, np.arange(size) - 1) % size, has_negative
