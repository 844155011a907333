"""Draw a step's samples, their variants, their negatives, and the rows whose condition is dropped.

Everything here is a pure function of (data, seed, step) over the *global* batch, before any sharding. Losses are
therefore the same for every data-parallel size and micro batch size. A resumed run needs only the step number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_cca.data.sample_order import SampleOrder

# Separate the random streams of one (seed, step). data/sample_order.py uses other numbers.
_DROPOUT, _BUCKETS, _VARIANTS = 1, 4, 5

RowsOf = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class GlobalBatch:
    """The rows of one step, before sharding. Arrays of length ``global_batch_size``.

    Attributes:
        sample_ids: int64. The sample whose image (and own caption) the row holds.
        negative_ids: int64. The sample whose caption is the row's negative condition.
        condition_dropped: bool. True where both conditions of the row are the empty caption.
        negative_is_positive: bool. True where the row has no true negative: its condition was dropped, or the batch has
            no other condition of another image.
        variants: int64. The variant of the row's image.
    """

    sample_ids: np.ndarray
    negative_ids: np.ndarray
    condition_dropped: np.ndarray
    negative_is_positive: np.ndarray
    variants: np.ndarray


@dataclass(frozen=True)
class Pairing:
    """The rule by which the global batches of a run are drawn.

    Attributes:
        order: the stream of samples.
        rows: maps sample ids ``[B]`` to their rows in the data's table (:data:`megatron_cca.data.token_files.SAMPLE`).
        global_batch_size: B.
        condition_dropout: probability that a row's condition is dropped.
        length_bucketing: the samples of so many steps are sorted by length together, to pad less. 1 switches it off.
        seed: of the run.
        num_variants: maps sample ids ``[B]`` to how many variants each has. None means one.
    """

    order: SampleOrder
    rows: RowsOf
    global_batch_size: int
    condition_dropout: float
    seed: int
    length_bucketing: int = 1
    num_variants: RowsOf | None = None

    def at(self, step: int) -> GlobalBatch:
        """Return the batch of a step. Steps are counted from 0."""
        samples = self._samples(step)
        table = self.rows(samples)
        # Another caption of the same image is no negative: a photograph can have several true captions.
        negative_rows, has_negative = rolled_negatives(table["caption"], table["condition"], table["codes"])
        draws = np.random.default_rng((self.seed, _DROPOUT, step)).random(self.global_batch_size)
        dropped = draws < self.condition_dropout
        is_positive = dropped | ~has_negative
        return GlobalBatch(samples, samples[negative_rows], dropped, is_positive, self._variants(samples, step))

    def _variants(self, samples: np.ndarray, step: int) -> np.ndarray:
        if self.num_variants is None:
            return np.zeros(len(samples), dtype=np.int64)
        draws = np.random.default_rng((self.seed, _VARIANTS, step)).random(len(samples))
        return (draws * self.num_variants(samples)).astype(np.int64)

    def _samples(self, step: int) -> np.ndarray:
        size, steps = self.global_batch_size, self.length_bucketing
        if steps == 1:
            return self.order.at(np.arange(step * size, (step + 1) * size))
        window, turn = divmod(step, steps)
        samples = self.order.at(np.arange(window * steps * size, (window + 1) * steps * size))
        by_length = np.argsort(_lengths(self.rows(samples)), kind="stable")
        # The order of lengths is random in every window, not from short to long.
        bucket = np.random.default_rng((self.seed, _BUCKETS, window)).permutation(steps)[turn]
        # In the stream's order, so that neighbours, whose captions are the negatives, differ in length.
        return samples[np.sort(by_length[bucket * size : (bucket + 1) * size])]


def _lengths(table: np.ndarray) -> np.ndarray:
    return table["grid"].prod(axis=1, dtype=np.int64) + table["caption_length"]


def rolled_negatives(*conditions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return, for each row, the row whose condition is its negative.

    It is the row before or, if that has the same condition, the nearest earlier row with another one, counted
    cyclically. A random permutation would have fixed points, which bias small batches.

    Args:
        conditions: arrays ``[B]``. Two rows have the same condition if they are equal in any of these.

    Returns:
        int64 ``[B]``, the row whose condition is the negative, and bool ``[B]``, whether there is a different
        condition. Where there is none, the negative is the row before.
    """
    size = len(conditions[0])
    rows = np.arange(size)
    negatives = (rows - 1) % size
    open_rows = rows
    for back in range(1, size + 1):
        candidates = (open_rows - back) % size
        same = np.logical_or.reduce([ids[candidates] == ids[open_rows] for ids in conditions])
        negatives[open_rows[~same]] = candidates[~same]
        open_rows = open_rows[same]
        if not len(open_rows):
            break
    has_negative = np.ones(size, dtype=bool)
    has_negative[open_rows] = False
    return negatives, has_negative
