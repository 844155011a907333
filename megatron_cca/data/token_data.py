"""Several shard folders as one data set: sample ids count through them in the order they were named."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np

from megatron_cca.data.shards import TokenShards
from megatron_cca.data.token_files import SAMPLE
from megatron_cca.models.image_vocabulary import ImageVocabulary


@dataclass(frozen=True)
class TokenData:
    """Everything that a run may draw from.

    Attributes:
        shards: the folders; at least one, all of one vocabulary.
        weights: each folder's share of the samples that a run sees, up to a common factor.
    """

    shards: Sequence[TokenShards]
    weights: Sequence[float] = (1.0,)

    def __post_init__(self) -> None:
        assert len(self.shards) == len(self.weights)

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def vocabulary(self) -> ImageVocabulary:
        """The one that all folders were tokenised for."""
        return self.shards[0].vocabulary

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *accumulate(len(shards) for shards in self.shards)]

    def ids(self, folder: int) -> np.ndarray:
        """The sample ids of one folder, int64."""
        return np.arange(self._starts[folder], self._starts[folder + 1])

    def rows(self, samples: np.ndarray) -> np.ndarray:
        """The table's rows (:data:`SAMPLE`) of these sample ids."""
        return self._looked_up(samples, np.empty(len(samples), SAMPLE), lambda shards: shards.table)

    def num_repeated_images(self) -> int:
        """How many samples show the image of a sample before them, as under another caption: their codes are equal."""
        codes = np.concatenate([shards.table["codes"] for shards in self.shards])
        return len(codes) - len(np.unique(codes))

    def num_variants(self, samples: np.ndarray) -> np.ndarray:
        """How many variants these sample ids have, int32."""
        return self._looked_up(samples, np.empty(len(samples), np.int32), lambda shards: shards.variants)

    def codes(self, sample: int, variant: int = 0) -> np.ndarray:
        """Codebook indices, uint16 ``[T, H, W]``; raises as :meth:`TokenShards.codes` does."""
        shards, local = self._place(sample)
        return shards.codes(local, variant)

    def caption(self, sample: int) -> np.ndarray:
        """Caption tokens, int32 ``[C]``; raises as :meth:`TokenShards.caption` does."""
        shards, local = self._place(sample)
        return shards.caption(local)

    def meta_words(self, sample: int, grid: tuple[int, int, int]) -> np.ndarray:
        """What a prompt says of the grid; raises as :meth:`TokenShards.meta_words` does."""
        return self._place(sample)[0].meta_words(grid)

    def describe(self, sample: int) -> str:
        """A sample in words, for messages."""
        shards, local = self._place(sample)
        return f"sample {local} of {shards.folder}"

    def fingerprint(self) -> str:
        """A short hash of all manifests and weights."""
        if len(self.shards) == 1:
            return self.shards[0].fingerprint()
        parts = [(shards.fingerprint(), weight) for shards, weight in zip(self.shards, self.weights, strict=True)]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def _looked_up(
        self, samples: np.ndarray, found: np.ndarray, column: Callable[[TokenShards], np.ndarray]
    ) -> np.ndarray:
        folders = np.searchsorted(self._starts, samples, side="right") - 1
        for folder in np.unique(folders):
            here = folders == folder
            found[here] = column(self.shards[folder])[samples[here] - self._starts[folder]]
        return found

    def _place(self, sample: int) -> tuple[TokenShards, int]:
        folder = bisect_right(self._starts, sample) - 1
        return self.shards[folder], sample - self._starts[folder]
