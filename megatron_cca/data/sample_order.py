"""Which sample stands where in the endless stream that steps are cut from: pure in (data, seed, position)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from megatron_cca.data.token_data import TokenData
from megatron_cca.errors import UserError

# A blend keeps its proportions exactly within every block of this many positions.
BLOCK = 8192

# Keeps the random streams of one seed apart; those of data/pairing.py go on from here.
_PERMUTATION, _BLEND, _HELD_OUT = 0, 2, 3


@dataclass(frozen=True)
class SampleOrder:
    """Each pool is passed through in full, in a new order every epoch; a blend draws from its pools in proportion.

    Attributes:
        pools: int64 sample ids of each data set that may be drawn; none is empty.
        weights: each pool's share, up to a common factor.
        seed: of the run.
    """

    pools: tuple[np.ndarray, ...]
    weights: tuple[float, ...]
    seed: int

    def at(self, positions: np.ndarray) -> np.ndarray:
        """The sample ids at these positions (int64, from 0)."""
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
        """Positions of each pool in a block: largest remainders."""
        exact = np.array(self.weights) * (BLOCK / sum(self.weights))
        counts = np.floor(exact).astype(np.int64)
        most = np.argsort(counts - exact, kind="stable")
        counts[most[: BLOCK - counts.sum()]] += 1
        return tuple(counts.tolist())

    def _drawn(self, pool: int, drawn: np.ndarray) -> np.ndarray:
        """The pool's samples number ``drawn`` (from 0, over all epochs)."""
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
    """For each position of a block its pool, and how many of that pool came before it in the block."""
    pattern = np.repeat(np.arange(len(counts)), counts)
    np.random.default_rng((seed, _BLEND, block)).shuffle(pattern)
    earlier = np.empty(BLOCK, dtype=np.int64)
    for pool, count in enumerate(counts):
        earlier[pattern == pool] = np.arange(count)
    return pattern, earlier


def training_order(data: TokenData, seed: int, held_out_fraction: float, split_seed: int) -> SampleOrder:
    """The stream of a run: everything but what is held out.

    Raises:
        UserError: a folder of which nothing is left, or whose weight is too small to be drawn.
    """
    split = _split(data, held_out_fraction, split_seed)
    _check_weights(data)
    return SampleOrder(tuple(kept for kept, _ in split), tuple(data.weights), seed)


def held_out_order(data: TokenData, fraction: float, split_seed: int) -> SampleOrder:
    """The stream of the held-out samples, in the same proportions; the same for every run on this data.

    Raises:
        UserError: a folder of which nothing is held out.
    """
    split = _split(data, fraction, split_seed)
    return SampleOrder(tuple(held for _, held in split), tuple(data.weights), split_seed)


def _split(data: TokenData, fraction: float, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each folder the sample ids that are kept and those that are held out; both in order."""
    parts = []
    for folder, shards in enumerate(data.shards):
        ids = data.ids(folder)
        held = round(fraction * len(ids))
        if fraction > 0 and not 0 < held < len(ids):
            raise UserError(
                f"validation.fraction: {fraction} of the {len(ids)} samples in {shards.folder} are {held}; choose it "
                "so that some are held out and some are left"
            )
        # Not by the folder's place in a blend: a folder has the same held-out samples in every run.
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
