"""Read several shard folders as one data set. Sample ids count through the folders in their order."""

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
    """All data of a run.

    Attributes:
        shards: the folders. At least one, all of one vocabulary.
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
        """The vocabulary that all folders were tokenised for."""
        return self.shards[0].vocabulary

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *accumulate(len(shards) for shards in self.shards)]

    def ids(self, folder: int) -> np.ndarray:
        """Return the sample ids of one folder, int64."""
        return np.arange(self._starts[folder], self._starts[folder + 1])

    def rows(self, samples: np.ndarray) -> np.ndarray:
        """Return the rows of the table (:data:`SAMPLE`) for these sample ids."""
        return self._looked_up(samples, np.empty(len(samples), SAMPLE), lambda shards: shards.table)

    def num_repeated_images(self) -> int:
        """Return how many samples repeat the image of an earlier sample, as under another caption.

        Equal codes are one image.
        """
        codes = np.concatenate([shards.table["codes"] for shards in self.shards])
        return len(codes) - len(np.unique(codes))

    def num_variants(self, samples: np.ndarray) -> np.ndarray:
        """Return how many variants these sample ids have, int32."""
        return self._looked_up(samples, np.empty(len(samples), np.int32), lambda shards: shards.variants)

    def codes(self, sample: int, variant: int = 0) -> np.ndarray:
        """Return codebook indices, uint16 ``[T, H, W]``. Raises as :meth:`TokenShards.codes` does."""
        shards, local = self._place(sample)
        return shards.codes(local, variant)

    def caption(self, sample: int) -> np.ndarray:
        """Return caption tokens, int32 ``[C]``. Raises as :meth:`TokenShards.caption` does."""
        shards, local = self._place(sample)
        return shards.caption(local)

    def meta_ids(self, sample: int, grid: tuple[int, int, int]) -> np.ndarray:
        """Return the token ids of a prompt that state the grid. Raises as :meth:`TokenShards.meta_ids` does."""
        return self._place(sample)[0].meta_ids(grid)

    def describe(self, sample: int) -> str:
        """Return the name of a sample for messages."""
        shards, local = self._place(sample)
        return f"sample {local} of {shards.folder}"

    def fingerprint(self) -> str:
        """Return a short hash of all manifests and weights."""
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
