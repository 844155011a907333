"""Read folders of token shards, one or several as one data set.

Reading is random access, with a check of each sample's checksum. Sample ids count through the folders in order.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_cca.data.manifest import (
    FILE_NAME,
    SAMPLE,
    UNCONDITIONAL,
    VARIANTS,
    check_files,
    checksum,
    fingerprint,
    grid_key,
    meta_ids,
    open_table,
    read_manifest,
    unconditional_ids,
)
from megatron_cca.errors import UserError, error_context
from megatron_cca.megatron_compat.indexed_dataset import open_indexed
from megatron_cca.models.image_vocabulary import ImageVocabulary

if TYPE_CHECKING:
    from megatron_cca.data.partners import Partners

DEFAULT_KEY = "data.path"


class TokenShards:
    """Random access to a shard folder. Files that are removed after it was opened can still be read.

    Args:
        folder: written by :func:`write_shards`.
        vocabulary: the model's.
        key: the option that named the folder, for messages.

    Attributes:
        key: the option that named the folder, for messages.
        table: :data:`SAMPLE` ``[N]``, memory-mapped.
        variants: int32 ``[N]``, how many variants each sample has.

    Raises:
        UserError: a missing folder or file, a truncated or changed one, another vocabulary, or no samples; names the
            file.
    """

    def __init__(self, folder: str | Path, vocabulary: ImageVocabulary, key: str = DEFAULT_KEY) -> None:
        self.folder = Path(folder)
        self.vocabulary = vocabulary
        self.key = key
        self._sizes = {"codes": vocabulary.codebook_size, "captions": vocabulary.caption_size}
        with error_context(key):
            self.manifest = read_manifest(self.folder)
            self._check_vocabulary()
            self._check_meta_ids()
            check_files(self.folder, self.manifest)
            if len(self) < 1:
                raise UserError(f"{self.folder} holds no samples")
            has_variants = VARIANTS in self.manifest["files"]
            self.table, self.variants = open_table(
                self.folder, len(self), vocabulary.codebook_size, has_variants=has_variants
            )
            if not self.table["caption_length"].any():
                raise UserError(f"{self.folder} has no caption that is not empty; there is nothing to learn from it")
        self._codes, self._captions = (open_indexed(self.folder / name) for name in ("codes", "captions"))

    def __len__(self) -> int:
        return self.manifest["num_samples"]

    def codes(self, sample: int, variant: int = 0) -> np.ndarray:
        """Return codebook indices, uint16 or int32 ``[T, H, W]``, of one of the sample's variants.

        Raises:
            UserError: the codes differ from what was written; names file and sample.
        """
        row = self.table[sample]
        return self._checked(self._codes, "codes", sample, row["codes"]).reshape(-1, *row["grid"])[variant]

    def caption(self, sample: int) -> np.ndarray:
        """Return caption tokens, int32 ``[C]``. Raises as :meth:`codes` does."""
        return self._checked(self._captions, "captions", sample, self.table[sample]["caption"])

    def tokenizer(self, kind: Literal["image", "text"]) -> str | None:
        """Return the fingerprint of the tokenizer that made the codes or the captions. Return None if it is unknown."""
        found = self.manifest.get(f"{kind}_tokenizer")
        return found.get("fingerprint") if isinstance(found, dict) else None

    def _checked(self, tokens: IndexedDataset, name: str, sample: int, expected: np.uint64) -> np.ndarray:
        try:
            found = tokens[int(sample)]
        except OSError as error:
            raise UserError(f"{self.key}: {self.folder / name}.bin: sample {sample}: {error.strerror}") from None
        if checksum(found) != expected:
            raise UserError(
                f"{self.key}: {self.folder / name}.bin: sample {sample} is not what was written (its checksum "
                "differs); the file is damaged, tokenize the data again"
            )
        if found.size and not 0 <= found.min() <= found.max() < self._sizes[name]:
            raise UserError(
                f"{self.key}: {self.folder / name}.bin: sample {sample} has tokens beyond the model's "
                f"{self._sizes[name]}; tokenize the data again"
            )
        return found

    def meta_ids(self, grid: tuple[int, int, int]) -> np.ndarray:
        """Return the token ids of a prompt that state a grid ``(T, H, W)`` of these data, int32 ``[G]``.

        Raises:
            UserError: a clip whose meta text is not known.
        """
        if grid not in self._meta_ids:
            raise UserError(
                f"{self.key}: {self.folder} holds clips ({grid_key(grid)} codes), and Emu3's authors have not "
                "published what stands between BOI and IMG of one; tokenize them with --clip-meta, or train on images"
            )
        return self._meta_ids[grid]

    def dropped_caption(self, caption_length: int) -> np.ndarray:
        """Return what stands in a prompt in place of a dropped caption, see :class:`ImageVocabulary`."""
        return self.vocabulary.dropped_caption(caption_length, self._unconditional)

    def fingerprint(self) -> str:
        """Return a short hash of the manifest, which holds the hash of every file."""
        return fingerprint(self.manifest)

    def _check_meta_ids(self) -> None:
        self._meta_ids, self._unconditional = meta_ids(self.manifest), unconditional_ids(self.manifest)
        named = [("meta_words", ids) for ids in self._meta_ids.values()]
        for name, ids in [*named, (UNCONDITIONAL, self._unconditional)]:
            if (ids >= self.vocabulary.caption_size).any():
                raise UserError(
                    f"{self.folder / FILE_NAME}: {name} has token {ids.max()}, the text vocabulary is "
                    f"{self.vocabulary.caption_size}; tokenize the data again"
                )

    def _check_vocabulary(self) -> None:
        theirs, ours = self.manifest["vocabulary"], self.vocabulary.fingerprint()
        if theirs != ours:
            raise UserError(
                f"{self.folder} was tokenized for another vocabulary ({theirs}) than the model's ({ours}); tokenize it "
                "again for this model"
            )


@dataclass(frozen=True)
class TokenData:
    """All data of a run.

    Attributes:
        shards: the folders. At least one, all of one vocabulary.
        weights: each folder's share of the samples that a run sees, up to a common factor.
        partners: folders whose samples are only the second image of pairs. Their ids follow the others'.
    """

    shards: Sequence[TokenShards]
    weights: Sequence[float] = (1.0,)
    partners: Sequence[TokenShards] = ()

    def __post_init__(self) -> None:
        assert len(self.shards) == len(self.weights)

    def __len__(self) -> int:
        return self._starts[len(self.shards)]

    @property
    def vocabulary(self) -> ImageVocabulary:
        """The vocabulary that all folders were tokenised for."""
        return self.shards[0].vocabulary

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *accumulate(len(shards) for shards in self.folders)]

    @cached_property
    def folders(self) -> list[TokenShards]:
        """All folders, those of partners last."""
        return [*self.shards, *self.partners]

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
        """Return codebook indices, uint16 or int32 ``[T, H, W]``. Raises as :meth:`TokenShards.codes` does."""
        shards, local = self._place(sample)
        return shards.codes(local, variant)

    def caption(self, sample: int) -> np.ndarray:
        """Return caption tokens, int32 ``[C]``. Raises as :meth:`TokenShards.caption` does."""
        shards, local = self._place(sample)
        return shards.caption(local)

    def meta_ids(self, sample: int, grid: tuple[int, int, int]) -> np.ndarray:
        """Return the token ids of a prompt that state the grid. Raises as :meth:`TokenShards.meta_ids` does."""
        return self._place(sample)[0].meta_ids(grid)

    def dropped_caption(self, sample: int) -> np.ndarray:
        """Return what stands in a prompt in place of a sample's caption, int ``[U]``."""
        shards, local = self._place(sample)
        return shards.dropped_caption(int(shards.table["caption_length"][local]))

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

    @cached_property
    def image_partners(self) -> Partners:
        """The partners of all samples, for pairs of images. Raises as :func:`find_partners` does."""
        from megatron_cca.data.partners import find_partners

        return find_partners(self)

    def partners_fingerprint(self) -> str | None:
        """Return a short hash of the folders of partners. Return None if there are none."""
        return TokenData(self.partners).fingerprint() if self.partners else None

    def _looked_up(
        self, samples: np.ndarray, found: np.ndarray, column: Callable[[TokenShards], np.ndarray]
    ) -> np.ndarray:
        folders = np.searchsorted(self._starts, samples, side="right") - 1
        for folder in np.unique(folders):
            here = folders == folder
            found[here] = column(self.folders[folder])[samples[here] - self._starts[folder]]
        return found

    def _place(self, sample: int) -> tuple[TokenShards, int]:
        folder = bisect_right(self._starts, sample) - 1
        return self.folders[folder], sample - self._starts[folder]
