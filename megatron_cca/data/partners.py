"""Pairs of images: a sample and its partner, another image for the same condition, which is the pair's second row.

Partners lie in shard folders of their own, matched by condition, such as images that a model drew. Or the sample's own
folder says who they are, in ``pairs.npy``: int64 ``[P, 2]``, a winner and a loser by their numbers in the folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_cca.data.pairing import GlobalBatch, Pairing
from megatron_cca.data.shards import TokenData, TokenShards
from megatron_cca.errors import UserError, error_context
from megatron_cca.io.external_files import mapped_array

PAIRS = "pairs.npy"
# Separate the random streams of one (seed, step). data/pairing.py uses other numbers.
_PARTNERS, _PARTNER_VARIANTS = 6, 7


@dataclass(frozen=True)
class Partners:
    """The partners of all samples: those of sample s are ``ids[first[s] : first[s] + count[s]]``.

    Attributes:
        first, count: int64 ``[N]``.
        ids: int64 ``[M]``, sample ids.
    """

    first: np.ndarray
    count: np.ndarray
    ids: np.ndarray

    def drawn(self, samples: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Return a partner of each sample, int64 ``[B]``, for random numbers from 0 to 1."""
        return self.ids[self.first[samples] + (draws * self.count[samples]).astype(np.int64)]


@dataclass(frozen=True)
class ImagePairing(Pairing):
    """The rule by which global batches of pairs of images are drawn.

    Both rows have the sample's own condition, or both have none where it is dropped.

    Attributes:
        partners: of the data.
    """

    partners: Partners | None = None

    def at(self, step: int) -> GlobalBatch:
        """Return the batch of a step. Steps are counted from 0."""
        samples = self._samples(step)
        partners, dropped = self.partners.drawn(samples, self._draws(_PARTNERS, step)), self._dropped(step)
        return GlobalBatch(
            sample_ids=samples,
            negative_ids=samples,
            condition_dropped=dropped,
            negative_is_positive=np.zeros(len(samples), dtype=bool),
            variants=self._variants(samples, step),
            second_ids=partners,
            second_variants=self._variants(partners, step, _PARTNER_VARIANTS),
            second_dropped=dropped,
        )


def find_partners(data: TokenData) -> Partners:
    """Return the partners of all samples: in the data's folders of partners if there are some, else in its own.

    It reads the whole table. :attr:`TokenData.image_partners` keeps the result.

    Raises:
        UserError: a sample without a partner in folders of partners, a folder that names no pairs, or a damaged file.
    """
    if not data.partners:
        return _within(data)
    captions = data.rows(np.arange(len(data)))["caption"]
    places = np.arange(len(data), len(data) + sum(map(len, data.partners)))
    found = _grouped(data.rows(places)["caption"], captions, places)
    lacking = np.flatnonzero(found.count == 0)
    if lacking.size:
        _check_text_tokenizers(data)
        raise UserError(
            f"{data.partners[0].key}: no image there has the condition of {data.describe(int(lacking[0]))}"
            f"{f' and of {lacking.size - 1} more' if lacking.size > 1 else ''}; a pair of images needs two for one "
            "condition: draw or tokenize some for it"
        )
    return found


def _check_text_tokenizers(data: TokenData) -> None:
    """Refuse folders of another text tokenizer, whose conditions can only be others."""
    ours, theirs = data.shards[0], data.partners[0]
    own, other = (shards.tokenizer("text") for shards in (ours, theirs))
    if own is not None and other is not None and own != other:
        raise UserError(
            f"{theirs.key}: {theirs.folder} has captions of another text tokenizer ({other}) than {ours.folder} "
            f"({own}); tokenize both with the same one"
        )


def _within(data: TokenData) -> Partners:
    pairs = [_pairs(shards) + data.ids(folder)[0] for folder, shards in enumerate(data.shards)]
    winners, losers = np.concatenate(pairs).T
    return _grouped(winners, np.arange(len(data)), losers)


def _grouped(names: np.ndarray, wanted: np.ndarray, ids: np.ndarray) -> Partners:
    """Return, for each of ``wanted`` ``[N]``, the ``ids`` ``[M]`` whose ``names`` ``[M]`` are equal to it."""
    order = np.argsort(names, kind="stable")
    first, end = (np.searchsorted(names[order], wanted, side=side) for side in ("left", "right"))
    return Partners(first, end - first, ids[order])


def _pairs(shards: TokenShards) -> np.ndarray:
    path = shards.folder / PAIRS
    with error_context(shards.key):
        if PAIRS not in shards.manifest["files"]:
            raise UserError(
                f"{shards.folder} names no pairs of images ({PAIRS}); tokenize preferences, or name the partners' "
                "folder in data.partner_path"
            )
        return read_pairs(path, shards.table)


def read_pairs(path: Path, table: np.ndarray) -> np.ndarray:
    """Return the pairs of a folder, int64 ``[P, 2]``.

    Args:
        path: the file.
        table: of the folder's samples.

    Raises:
        UserError: damaged, empty, a number that is no sample, or two samples of different conditions; names the file.
    """
    with error_context(path):
        pairs = mapped_array(path)
        if pairs.dtype != np.int64 or pairs.ndim != 2 or pairs.shape[1] != 2 or not len(pairs):
            raise UserError(f"must hold int64 [P, 2], holds {pairs.dtype} {list(pairs.shape)}")
        if pairs.min() < 0 or pairs.max() >= len(table):
            raise UserError(f"names sample {pairs.max() if pairs.min() >= 0 else pairs.min()} of {len(table)}")
        other = np.flatnonzero(table["caption"][pairs[:, 0]] != table["caption"][pairs[:, 1]])
        if other.size:
            raise UserError(f"pair {other[0]}, samples {pairs[other[0]].tolist()}, has two conditions; it must be one")
    return np.array(pairs)
