"""The samples of a step: their order, variants, negatives and dropped rows.

Everything here is a pure function of (data, seed, step) over the *global* batch, before any sharding. Losses are
therefore the same for every data-parallel size and micro batch size. A resumed run needs only the step number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from megatron_cca.data.shards import TokenData
from megatron_cca.errors import UserError

# A blend keeps its proportions exactly within every block of this many positions.
BLOCK = 8192

# Separate the random streams of one seed. Those of one (seed, step) have other numbers.
_PERMUTATION, _BLEND, _HELD_OUT = 0, 2, 3
# Separate the random streams of one (seed, step). data/partners.py uses other numbers.
_DROPOUT, _BUCKETS, _VARIANTS = 1, 4, 5
RowsOf = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class SampleOrder:
    """A stream of samples.

    Each pool is read in full, in a new order every epoch. A blend draws from pools in proportion.

    Attributes:
        pools: int64 sample ids of each data set. None is empty.
        weights: each pool's share, up to a common factor.
        seed: of the run.
    """

    pools: tuple[np.ndarray, ...]
    weights: tuple[float, ...]
    seed: int

    def at(self, positions: np.ndarray) -> np.ndarray:
        """Return the sample ids at positions of the stream, int64 from 0."""
        if len(self.pools) == 1:
            return self._drawn(0, positions)
        samples = np.empty_like(positions)
        blocks, offsets = np.divmod(positions, BLOCK)
        for block in np.unique(blocks):
            here = np.flatnonzero(blocks == block)
            pattern, earlier = _block_pattern(self._counts, self.seed, int(block))
            pools, ranks = pattern[offsets[here]], earlier[offsets[here]]
            for pool, count in enumerate(self._counts):
                mine = pools == pool
                samples[here[mine]] = self._drawn(pool, block * count + ranks[mine])
        return samples

    @cached_property
    def _counts(self) -> tuple[int, ...]:
        """The number of positions of a block that each pool has, by the method of largest remainders."""
        exact = np.array(self.weights) * (BLOCK / sum(self.weights))
        counts = np.floor(exact).astype(np.int64)
        most = np.argsort(counts - exact, kind="stable")
        counts[most[: BLOCK - counts.sum()]] += 1
        return tuple(counts.tolist())

    def _drawn(self, pool: int, drawn: np.ndarray) -> np.ndarray:
        """Return the sample ids of one pool's draws number ``drawn``, counted from 0 over all epochs."""
        size = len(self.pools[pool])
        epochs, offsets = np.divmod(drawn, size)
        samples = np.empty_like(drawn)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            order = _epoch_permutation(size, self.seed, pool, int(epoch))
            samples[here] = self.pools[pool][order[offsets[here]]]
        return samples


def training_order(
    data: TokenData, seed: int, held_out_fraction: float, split_seed: int, counts: np.ndarray | None = None
) -> SampleOrder:
    """Return the stream of a run: everything that is not held out.

    Args:
        data: of the run.
        seed: of the run.
        held_out_fraction, split_seed: see :class:`megatron_cca.config.ValidationConfig`.
        counts: partners of each sample. Samples without any are left out. None means that all are taken.

    Raises:
        UserError: a folder with no samples left, or with a weight that is too small to be drawn.
    """
    split = _split(data, held_out_fraction, split_seed, counts)
    _check_weights(data)
    return SampleOrder(tuple(kept for kept, _ in split), tuple(data.weights), seed)


def held_out_order(data: TokenData, fraction: float, split_seed: int, counts: np.ndarray | None = None) -> SampleOrder:
    """Return the stream of the held-out samples, in the same proportions. It is the same for every run on these data.

    The arguments are those of :func:`training_order`.

    Raises:
        UserError: a folder with no held-out samples.
    """
    split = _split(data, fraction, split_seed, counts)
    return SampleOrder(tuple(held for _, held in split), tuple(data.weights), split_seed)


@dataclass(frozen=True)
class GlobalBatch:
    """The rows of one step, before sharding. Arrays of length ``global_batch_size``.

    Attributes:
        sample_ids: int64. The sample whose image (and own caption) the row holds.
        negative_ids: int64. The sample whose caption is the condition of the pair's second row.
        condition_dropped: bool. True where the condition of the pair's first row is the empty caption.
        negative_is_positive: bool. True where the row has no true negative: its condition was dropped, or the batch has
            no other condition of another image.
        variants: int64. The variant of the row's image.
        second_ids, second_variants: int64. The image of the pair's second row: the same, or its partner.
        second_dropped: bool. True where the condition of the pair's second row is the empty caption.
    """

    sample_ids: np.ndarray
    negative_ids: np.ndarray
    condition_dropped: np.ndarray
    negative_is_positive: np.ndarray
    variants: np.ndarray
    second_ids: np.ndarray
    second_variants: np.ndarray
    second_dropped: np.ndarray


@dataclass(frozen=True)
class Pairing:
    """The rule by which the global batches of a run are drawn.

    Attributes:
        order: the stream of samples.
        rows: maps sample ids ``[B]`` to their rows in the data's table (:data:`megatron_cca.data.manifest.SAMPLE`).
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
        dropped, variants = self._dropped(step), self._variants(samples, step)
        is_positive = dropped | ~has_negative
        return GlobalBatch(samples, samples[negative_rows], dropped, is_positive, variants, samples, variants, dropped)

    def _draws(self, stream: int, step: int) -> np.ndarray:
        return np.random.default_rng((self.seed, stream, step)).random(self.global_batch_size)

    def _dropped(self, step: int) -> np.ndarray:
        return self._draws(_DROPOUT, step) < self.condition_dropout

    def _variants(self, samples: np.ndarray, step: int, stream: int = _VARIANTS) -> np.ndarray:
        if self.num_variants is None:
            return np.zeros(len(samples), dtype=np.int64)
        return (self._draws(stream, step) * self.num_variants(samples)).astype(np.int64)

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


@lru_cache(maxsize=8)
def _epoch_permutation(size: int, seed: int, pool: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, _PERMUTATION, epoch, pool)).permutation(size)


@lru_cache(maxsize=4)
def _block_pattern(counts: tuple[int, ...], seed: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the pool of each position of a block, and how many earlier positions of the block have the same pool."""
    pattern = np.repeat(np.arange(len(counts)), counts)
    np.random.default_rng((seed, _BLEND, block)).shuffle(pattern)
    earlier = np.empty(BLOCK, dtype=np.int64)
    for pool, count in enumerate(counts):
        earlier[pattern == pool] = np.arange(count)
    return pattern, earlier


def _split(
    data: TokenData, fraction: float, seed: int, counts: np.ndarray | None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return, for each folder, the sample ids that are kept and those that are held out, both in order."""
    parts = []
    for folder, shards in enumerate(data.shards):
        ids = data.ids(folder) if counts is None else data.ids(folder)[counts[data.ids(folder)] > 0]
        held = round(fraction * len(ids))
        if fraction > 0 and not 0 < held < len(ids):
            raise UserError(
                f"validation.fraction: {fraction} of the {len(ids)} samples in {shards.folder} are {held}; choose it "
                "so that some are held out and some are left"
            )
        # The folder's place in a blend does not matter: a folder has the same held-out samples in every run.
        order = np.random.default_rng((seed, _HELD_OUT, len(ids))).permutation(len(ids))
        parts.append((ids[np.sort(order[held:])], ids[np.sort(order[:held])]))
    return parts


def _check_weights(data: TokenData) -> None:
    for shards, weight in zip(data.shards, data.weights, strict=True):
        if weight * BLOCK < sum(data.weights):
            raise UserError(
                f"data.path: the weight {weight:g} of {shards.folder} is less than 1/{BLOCK} of the whole blend; leave "
                "it out or give it more"
            )


def _lengths(table: np.ndarray) -> np.ndarray:
    return table["grid"].prod(axis=1, dtype=np.int64) + table["caption_length"]
