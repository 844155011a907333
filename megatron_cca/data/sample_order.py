"""The order of samples in the endless stream that steps take them from: a pure function of (data, seed, position)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from megatron_cca.data.token_data import TokenData
from megatron_cca.errors import UserError

# A blend keeps its proportions exactly within every block of this many positions.
BLOCK = 8192

# Separate the random streams of one seed. data/pairing.py uses other numbers.
_PERMUTATION, _BLEND, _HELD_OUT = 0, 2, 3


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


def training_order(data: TokenData, seed: int, held_out_fraction: float, split_seed: int) -> SampleOrder:
    """Return the stream of a run: everything that is not held out.

    Raises:
        UserError: a folder with no samples left, or with a weight that is too small to be drawn.
    """
    split = _split(data, held_out_fraction, split_seed)
    _check_weights(data)
    return SampleOrder(tuple(kept for kept, _ in split), tuple(data.weights), seed)


def held_out_order(data: TokenData, fraction: float, split_seed: int) -> SampleOrder:
    """Return the stream of the held-out samples, in the same proportions. It is the same for every run on these data.

    Raises:
        UserError: a folder with no held-out samples.
    """
    split = _split(data, fraction, split_seed)
    return SampleOrder(tuple(held for _, held in split), tuple(data.weights), split_seed)


def _split(data: TokenData, fraction: float, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return, for each folder, the sample ids that are kept and those that are held out, both in order."""
    parts = []
    for folder, shards in enumerate(data.shards):
        ids = data.ids(folder)
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
