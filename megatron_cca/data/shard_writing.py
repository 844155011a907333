"""Write a folder of token shards: one sample at a time, or joined from parts; it appears only when it is whole.

:mod:`megatron_cca.data.shards` says what is in it, and reads it.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
import xxhash
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_cca.data.manifest import (
    FILE_NAME,
    FORMAT_VERSION,
    SAMPLE,
    TABLE,
    UNCONDITIONAL,
    VARIANTS,
    Json,
    checksum,
    code_lengths,
    grid_key,
    token_types,
)
from megatron_cca.data.partners import PAIRS
from megatron_cca.errors import UserError
from megatron_cca.io.external_files import mapped_array, sha256
from megatron_cca.megatron_compat.indexed_dataset import append_tokens
from megatron_cca.models.image_vocabulary import ImageVocabulary

EncodeText = Callable[[str], list[int]]


@dataclass(frozen=True)
class Sample:
    """One tokenised image or clip.

    Attributes:
        codes: int ``[H, W]``, ``[T, H, W]`` for T code frames, or ``[V, T, H, W]`` for V variants of one image, such as
            crops and its mirror image. A step sees one variant.
        caption: int ``[C]``.
        condition: samples with equal names have the same condition. A number is the hash of a name, as in another
            folder's table. None means that the caption is the condition.
    """

    codes: np.ndarray
    caption: np.ndarray
    condition: str | int | None = None


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
        encode_text: encodes text, for grid sizes and unconditional prompts in words. None where captions are classes.
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
        join_token_files(partial, parts, vocabulary)
        write_extras(partial)

    aside.mkdir()
    _write_folder(folder, aside, write_tokens, vocabulary, encode_text, facts, clip_template)


class TokenWriter:
    """A writer of the token files of samples, in the order of :meth:`add`.

    A context manager, whose end completes the files.

    Args:
        folder: an existing folder without token files.
        vocabulary: what the tokens mean.
    """

    def __init__(self, folder: Path, vocabulary: ImageVocabulary) -> None:
        self._folder, self._vocabulary = folder, vocabulary
        self._rows: list[tuple] = []
        self._variants: list[int] = []
        self._types = token_types(vocabulary.codebook_size)
        self._builders = {
            name: IndexedDatasetBuilder(str(folder / f"{name}.bin"), dtype=dtype) for name, dtype in self._types.items()
        }

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                self._finish()
        finally:
            for builder in self._builders.values():
                # The error that ended the block, such as a full disk, is the one to raise.
                with contextlib.suppress(OSError):
                    builder.data_file.close()

    def add(self, sample: Sample) -> None:
        """Write one sample.

        Raises:
            UserError: a code or caption token outside the vocabulary; names the sample.
        """
        _check_tokens(len(self._rows), sample, self._vocabulary)
        codes = sample.codes.astype(self._types["codes"]).reshape(-1)
        caption = sample.caption.astype(self._types["captions"])
        for name, tokens in (("codes", codes), ("captions", caption)):
            self._builders[name].add_item(torch.from_numpy(tokens))
            self._builders[name].end_document()
        variants, *grid = (1,) * (4 - sample.codes.ndim) + sample.codes.shape
        caption_checksum = checksum(caption)
        condition = caption_checksum if sample.condition is None else _condition_hash(sample.condition)
        self._rows.append((grid, len(caption), caption_checksum, condition, checksum(codes)))
        self._variants.append(variants)

    def _finish(self) -> None:
        for name, builder in self._builders.items():
            builder.finalize(str(self._folder / f"{name}.idx"))
        np.save(self._folder / TABLE, np.array(self._rows, dtype=SAMPLE))
        _save_variants(self._folder, np.array(self._variants, dtype=np.int32))


def join_token_files(folder: Path, parts: Sequence[Path], vocabulary: ImageVocabulary) -> None:
    """Write the token files of all parts, in their order, into ``folder``. Pairs name their samples anew."""
    tables = [mapped_array(part / TABLE) for part in parts]
    variants = [
        mapped_array(part / VARIANTS) if (part / VARIANTS).is_file() else np.ones(len(table), np.int32)
        for part, table in zip(parts, tables, strict=True)
    ]
    for name, dtype in token_types(vocabulary.codebook_size).items():
        builder = IndexedDatasetBuilder(str(folder / f"{name}.bin"), dtype=dtype)
        with contextlib.closing(builder.data_file):
            for part, table, counts in zip(parts, tables, variants, strict=True):
                lengths = code_lengths(table, counts) if name == "codes" else table["caption_length"]
                append_tokens(builder, part / f"{name}.bin", lengths.tolist())
        builder.finalize(str(folder / f"{name}.idx"))
    np.save(folder / TABLE, np.concatenate([np.empty(0, SAMPLE), *tables]))
    _save_variants(folder, np.concatenate([np.empty(0, np.int32), *variants]))
    starts = np.cumsum([0, *map(len, tables)]).tolist()
    pairs = [mapped_array(part / PAIRS) + start for part, start in zip(parts, starts, strict=False) if _has_pairs(part)]
    if pairs:
        np.save(folder / PAIRS, np.concatenate(pairs))


def write_manifest(folder: Path, contents: Json) -> None:
    """Write the manifest of a folder that is otherwise complete."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.iterdir())
        if path.name != FILE_NAME
    }
    text = json.dumps({"format_version": FORMAT_VERSION, **contents, "files": files}, indent=1, ensure_ascii=False)
    (folder / FILE_NAME).write_text(text + "\n", encoding="utf-8")


def _write_folder(folder, partial, write_tokens, vocabulary, encode_text, facts, clip_template=None) -> None:
    try:
        write_tokens(partial)
        grids = mapped_array(partial / TABLE)["grid"]
        contents = {
            "num_samples": len(grids),
            "vocabulary": vocabulary.fingerprint(),
            "meta_words": _meta_ids(vocabulary, grids, encode_text, clip_template),
            **_unconditional(vocabulary, encode_text),
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


def _unconditional(vocabulary: ImageVocabulary, encode_text: EncodeText | None) -> Json:
    words = vocabulary.unconditional_text()
    return {UNCONDITIONAL: encode_text(words)} if words else {}


def _save_variants(folder: Path, variants: np.ndarray) -> None:
    if (variants != 1).any():
        np.save(folder / VARIANTS, variants)


def _check_tokens(index: int, sample: Sample, vocabulary: ImageVocabulary) -> None:
    captions = "text vocabulary" if vocabulary.num_classes is None else "number of classes"
    for what, tokens, size, of in (
        ("visual code", sample.codes, vocabulary.codebook_size, "codebook"),
        ("caption token", sample.caption, vocabulary.caption_size, captions),
    ):
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < size:
            wrong = tokens.max() if tokens.max() >= size else tokens.min()
            raise UserError(f"sample {index}: {what} {wrong} does not fit a {of} of {size}")


def _has_pairs(part: Path) -> bool:
    return (part / PAIRS).is_file()


def _condition_hash(condition: str | int) -> int:
    if isinstance(condition, int):
        return condition
    return xxhash.xxh3_64_intdigest(condition.encode("utf-8", "surrogatepass"))
