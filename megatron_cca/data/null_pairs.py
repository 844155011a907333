"""Pairs for mixtures: the second row of a pair is the same image without its condition."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from megatron_cca.data.pairing import GlobalBatch, Pairing


@dataclass(frozen=True)
class NullPairing(Pairing):
    """The rule by which global batches are drawn whose samples are read once with and once without their condition.

    Samples, variants and dropped conditions are those of :class:`Pairing` for the same seed.
    """

    def at(self, step: int) -> GlobalBatch:
        """Return the batch of a step. Steps are counted from 0."""
        batch = super().at(step)
        everywhere = np.ones(self.global_batch_size, dtype=bool)
        return replace(batch, negative_ids=batch.sample_ids, second_dropped=everywhere)
