"""Write and read a folder of token shards. Reading is random access, with a check of each sample's checksum.

codes.* captions.* samples.npy   the tokens, see :mod:`megatron_cca.data.token_files`
tokenizer.json codebook.npy ...  tokenizers, to decode the tokens
skipped.jsonl                    skipped records, with reasons
manifest.json                    counts, fingerprints, the token ids of each grid, size and sha256 of every file
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_cca.data.manifest import (
    FILE_NAME,
    check_files,
    fingerprint,
    grid_key,
    meta_ids,
    read_manifest,
    write_manifest,
)
from megatron_cca.data.open_file import OpenFile
from megatron_cca.data.token_files import TABLE, VARIANTS, Sample, TokenWriter, checksum, join_token_files, open_table
from megatron_cca.errors import UserError, said_of
from megatron_cca.io.numpy_files import mapped_array
from megatron_cca.models.image_vocabulary import ImageVocabulary

DEFAULT_KEY = "data.path"

EncodeText = Callable[[str], list[int]]


def write_shards(
    folder: Path,
    samples: Iterable[Sample],
    vocabulary: ImageVocabulary,
    encode_text: EncodeText | None,
    write_extras: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write a shard folder. It appears under its name only when it is whole.

    Args:
        folder: must not exist yet.
        samples: in the order of their ids.
        vocabulary: what the tokens mean.
        encode_text: encodes text, for grid sizes in words. None where captions are classes.
        write_extras: called with the folder, adds further files (tokenizer, codebook).

    Raises:
        UserError: a code or caption token outside the vocabulary; names the sample.
    """

    def write_tokens(partial: Path) -> None:
        with TokenWriter(partial, vocabulary) as writer:
            for sample in samples:
                writer.add(sample)
        write_extras(partial)

    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    _write_folder(folder, partial, write_tokens, vocabulary, encode_text, {})


def merge_shards(
    folder: Path,
    parts: Sequence[Path],
    vocabulary: ImageVocabulary,
    encode_text: EncodeText | None,
    write_extras: Callable[[Path], None],
    facts: dict,
    aside: Path,
    clip_template: str | None = None,
) -> None:
    """Merge the token files of parts, in their order, into a shard folder. It appears only when it is whole.

    Args:
        folder, vocabulary, encode_text, write_extras: as for :func:`write_shards`.
        parts: folders written by :class:`TokenWriter`.
        facts: further entries of the manifest.
        aside: a folder on the same disk to write in until then. It must not exist.
        clip_template: the meta text of clips, see :meth:`ImageVocabulary.meta_text`.
    """

    def write_tokens(partial: Path) -> None:
        join_token_files(partial, parts)
        write_extras(partial)

    aside.mkdir()
    _write_folder(folder, aside, write_tokens, vocabulary, encode_text, facts, clip_template)


def _write_folder(folder, partial, write_tokens, vocabulary, encode_text, facts, clip_template=None) -> None:
    try:
        write_tokens(partial)
        grids = mapped_array(partial / TABLE)["grid"]
        contents = {
            "num_samples": len(grids),
            "vocabulary": vocabulary.fingerprint(),
            "meta_words": _meta_ids(vocabulary, grids, encode_text, clip_template),
            **facts,
        }
        write_manifest(partial, contents)
        partial.chmod(0o755)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _meta_ids(
    vocabulary: ImageVocabulary, grids: np.ndarray, encode_text: EncodeText | None, clip_template: str | None
) -> dict[str, list[int]]:
    texts = {grid_key(grid): vocabulary.meta_text(*grid, clip_template) for grid in np.unique(grids, axis=0).tolist()}
    return {key: encode_text(text) if text else [] for key, text in texts.items() if text is not None}


class TokenShards:
    """Random access to a shard folder. Files that are removed after it was opened can still be read.

    Args:
        folder: written by :func:`write_shards`.
        vocabulary: the model's.
        key: the option that named the folder, for messages.

    Attributes:
        table: :data:`SAMPLE` ``[N]``, memory-mapped.
        variants: int32 ``[N]``, how many variants each sample has.

    Raises:
        UserError: a missing folder or file, a truncated or changed one, another vocabulary, or no samples; names the
            file.
    """

    def __init__(self, folder: str | Path, vocabulary: ImageVocabulary, key: str = DEFAULT_KEY) -> None:
        self.folder = Path(folder)
        self.vocabulary = vocabulary
        self._key = key
        self._sizes = {"codes": vocabulary.codebook_size, "captions": vocabulary.caption_size}
        with said_of(key):
            self.manifest = read_manifest(self.folder)
            self._check_vocabulary()
            self._check_meta_ids()
            check_files(self.folder, self.manifest)
            if len(self) < 1:
                raise UserError(f"{self.folder} holds no samples")
            has_variants = VARIANTS in self.manifest["files"]
            self.table, self.variants = open_table(self.folder, len(self), has_variants=has_variants)
            if not self.table["caption_length"].any():
                raise UserError(f"{self.folder} has no caption that is not empty; there is nothing to learn from it")
        self._codes, self._captions = _indexed(self.folder / "codes"), _indexed(self.folder / "captions")

    def __len__(self) -> int:
        return self.manifest["num_samples"]

    def codes(self, sample: int, variant: int = 0) -> np.ndarray:
        """Return codebook indices, uint16 ``[T, H, W]``, of one of the sample's variants.

        Raises:
            UserError: the codes differ from what was written; names file and sample.
        """
        row = self.table[sample]
        return self._checked(self._codes, "codes", sample, row["codes"]).reshape(-1, *row["grid"])[variant]

    def caption(self, sample: int) -> np.ndarray:
        """Return caption tokens, int32 ``[C]``. Raises as :meth:`codes` does."""
        return self._checked(self._captions, "captions", sample, self.table[sample]["caption"])

    def _checked(self, tokens: IndexedDataset, name: str, sample: int, expected: np.uint64) -> np.ndarray:
        try:
            found = tokens[int(sample)]
        except OSError as error:
            raise UserError(f"{self._key}: {self.folder / name}.bin: sample {sample}: {error.strerror}") from None
        if checksum(found) != expected:
            raise UserError(
                f"{self._key}: {self.folder / name}.bin: sample {sample} is not what was written (its checksum "
                "differs); the file is damaged, tokenize the data again"
            )
        if found.size and not 0 <= found.min() <= found.max() < self._sizes[name]:
            raise UserError(
                f"{self._key}: {self.folder / name}.bin: sample {sample} has tokens beyond the model's "
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
                f"{self._key}: {self.folder} holds clips ({grid_key(grid)} codes), and Emu3's authors have not "
                "published what stands between BOI and IMG of one; tokenize them with --clip-meta, or train on images"
            )
        return self._meta_ids[grid]

    def fingerprint(self) -> str:
        """Return a short hash of the manifest, which holds the hash of every file."""
        return fingerprint(self.manifest)

    def _check_meta_ids(self) -> None:
        self._meta_ids = meta_ids(self.manifest)
        for ids in self._meta_ids.values():
            if (ids >= self.vocabulary.caption_size).any():
                raise UserError(
                    f"{self.folder / FILE_NAME}: meta_words has token {ids.max()}, the text vocabulary is "
                    f"{self.vocabulary.caption_size}; tokenize the data again"
                )

    def _check_vocabulary(self) -> None:
        theirs, ours = self.manifest["vocabulary"], self.vocabulary.fingerprint()
        if theirs != ours:
            raise UserError(
                f"{self.folder} was tokenized for another vocabulary ({theirs}) than the model's ({ours}); tokenize it "
                "again for this model"
            )


def _indexed(prefix: Path) -> IndexedDataset:
    found = IndexedDataset(str(prefix), mmap=False)
    found.bin_reader = OpenFile(prefix.with_name(f"{prefix.name}.bin"))
    return found
