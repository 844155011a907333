"""Describe a shard folder for people: counts, histograms, and some samples as pictures with captions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from megatron_cca.data.codebooks import codebook_file
from megatron_cca.data.manifest import FILE_NAME, Json, check_files, code_lengths, read_manifest
from megatron_cca.data.partners import PAIRS, read_pairs
from megatron_cca.data.shards import TokenShards
from megatron_cca.data.sources.source_protocol import read_skip_reasons
from megatron_cca.data.tiny_sizes import recorded_model
from megatron_cca.data.tokenizers import open_image_tokenizer, open_text_tokenizer
from megatron_cca.errors import UserError, error_context, one_line
from megatron_cca.models import FAMILIES, resolve_architecture
from megatron_cca.models.formats import ImageTokenizer
from megatron_cca.models.image_vocabulary import ImageVocabulary

_SHARDS, _IMAGE_TOKENIZER = "SHARDS", "--image-tokenizer"
_BARS, _BAR_WIDTH = 10, 40


def open_for_inspection(folder: Path) -> TokenShards:
    """Open the shards in ``folder``, for whichever model they are. Every file is compared with its checksum.

    Raises:
        UserError: as :class:`TokenShards` does, or a vocabulary that no model here has.
    """
    with error_context(_SHARDS):
        manifest = read_manifest(folder)
        shards = TokenShards(folder, _vocabulary(folder, manifest), _SHARDS)
        check_files(folder, manifest, thoroughly=True)
    return shards


def report(shards: TokenShards) -> str:
    """Return counts and histograms, as text of several lines."""
    table = shards.table
    lengths, grids = table["caption_length"], Counter(map(tuple, table["grid"].tolist()))
    unnamed = int((table["condition"] == table["caption"]).sum())
    lines = [
        f"{shards.folder}: {len(shards):,} samples, every file as it was written",
        f"visual codes        {int(code_lengths(table, shards.variants).sum()):,}{_variants(shards.variants)}",
        f"caption tokens      {int(lengths.sum(dtype=np.int64)):,}",
        f"different captions  {len(np.unique(table['caption']))}",
        f"different conditions {len(np.unique(table['condition']))} ({len(shards) - unnamed} samples name theirs)",
        *_pairs_line(shards),
        *_resizing(shards.manifest.get("resize")),
        *_drawing(shards.manifest.get("drawn")),
        f"skipped             {shards.manifest.get('skipped', 0)}{_reasons(shards.folder)}",
        *(f"of the source       {notice}" for notice in _notices(shards.manifest)),
        "tokens per caption",
        *_bars(_length_bins(lengths)),
        "code grids (height x width)",
        *_bars((_grid_name(grid), count) for grid, count in grids.most_common(_BARS)),
    ]
    if len(grids) > _BARS:
        lines.append(f"  and {len(grids) - _BARS} more")
    return "\n".join(lines)


def decoded_samples(
    shards: TokenShards, number: int, seed: int, image_tokenizer: Path | None, device: torch.device
) -> tuple[list[np.ndarray], list[str]]:
    """Decode some samples to images and captions.

    Args:
        shards: opened.
        number: how many samples, at most.
        seed: for the choice of samples.
        image_tokenizer: its folder. None means the one in the shards, or the one that they name.
        device: of the image tokenizer.

    Returns:
        Images uint8 ``[H, W, 3]`` (the first frames of clips) and their captions. Of pairs the better image comes
        before the worse one.

    Raises:
        UserError: no image tokenizer, or one that the samples were not made with.
    """
    tokenizer = image_tokenizer_of(shards, image_tokenizer, device)
    chosen, ranks = _chosen(shards, number, np.random.default_rng(seed))
    images = [_picture(tokenizer, shards.codes(sample)) for sample in chosen]
    captions = [shards.caption(sample).tolist() for sample in chosen]
    if shards.vocabulary.num_classes is not None:
        texts = [f"class {caption[0]}" if caption else "" for caption in captions]
    else:
        text = open_text_tokenizer(shards.folder)
        texts = [text.decode_caption(caption, shards.vocabulary.template) for caption in captions]
    return images, [f"{rank}{caption}" for rank, caption in zip(ranks, texts, strict=True)]


def _chosen(shards: TokenShards, number: int, random: np.random.Generator) -> tuple[list[int], list[str]]:
    """Return some samples, and what stands before their captions. Pairs are not taken apart."""
    pairs = _pairs(shards)
    if pairs is None:
        chosen = np.sort(random.permutation(len(shards))[:number]).tolist()
        return chosen, [""] * len(chosen)
    chosen = pairs[np.sort(random.permutation(len(pairs))[: max(1, number // 2)])].reshape(-1).tolist()
    return chosen, ["better: ", "worse: "] * (len(chosen) // 2)


def _pairs(shards: TokenShards) -> np.ndarray | None:
    if PAIRS not in shards.manifest["files"]:
        return None
    with error_context(_SHARDS):
        return read_pairs(shards.folder / PAIRS, shards.table)


def _pairs_line(shards: TokenShards) -> list[str]:
    pairs = _pairs(shards)
    return (
        [] if pairs is None else [f"pairs of images     {len(pairs):,} of {len(np.unique(pairs[:, 0])):,} better ones"]
    )


def _vocabulary(folder: Path, manifest: Json) -> ImageVocabulary:
    presets = [preset.vocabulary for family in FAMILIES.values() for preset in family.presets.values()]
    sized = recorded_model(folder, manifest)
    with suppress(UserError):
        presets += [resolve_architecture(sized).vocabulary] if sized is not None else []
    for vocabulary in presets:
        if vocabulary.fingerprint() == manifest["vocabulary"]:
            return vocabulary
    raise UserError(f"{folder / FILE_NAME}: its vocabulary ({manifest['vocabulary']}) is that of no model here")


def _resizing(choice: object) -> list[str]:
    return [] if choice is None else [f"images resized by   {one_line(str(choice))}"]


def _drawing(origin: object) -> list[str]:
    """Return what the samples were drawn with, if a model drew them."""
    if not isinstance(origin, dict):
        return []
    said = (f"{name} {value}" for name, value in origin.items() if value not in (None, "") and name != "prompts")
    return [f"drawn with          {one_line(', '.join(said))}"]


def _variants(counts: np.ndarray) -> str:
    least, most = int(counts.min()), int(counts.max())
    if most == 1:
        return ""
    return f", {most if least == most else f'{least} to {most}'} variants of each sample"


def _grid_name(grid: tuple[int, int, int]) -> str:
    frames, height, width = grid
    return f"{height} x {width}" if frames == 1 else f"{frames} frames of {height} x {width}"


def _length_bins(lengths: np.ndarray) -> list[tuple[str, int]]:
    counts, edges = np.histogram(
        lengths, bins=np.unique(np.linspace(lengths.min(), lengths.max() + 1, _BARS + 1).astype(int))
    )
    spans = zip(edges[:-1].tolist(), (edges[1:] - 1).tolist(), strict=True)
    names = [str(first) if first == last else f"{first} to {last}" for first, last in spans]
    return list(zip(names, counts.tolist(), strict=True))


def _bars(bins: Iterable[tuple[str, int]]) -> list[str]:
    bins = list(bins)
    most, width = max(count for _, count in bins), max(len(name) for name, _ in bins)
    return [f"  {name:>{width}}  {count:>9}  {'#' * round(_BAR_WIDTH * count / most)}" for name, count in bins]


def _notices(manifest: Json) -> list[str]:
    """Return the notices of the source's reader."""
    source = manifest.get("source")
    notices = source.get("notices") if isinstance(source, dict) else None
    return [one_line(notice) for notice in notices if isinstance(notice, str)] if isinstance(notices, list) else []


def _reasons(folder: Path) -> str:
    path = folder / "skipped.jsonl"
    try:
        reasons = read_skip_reasons([path] if path.is_file() else [])
        return f" ({one_line(reasons.line())})" if len(reasons) else ""
    except (ValueError, KeyError, TypeError, RecursionError):
        return f", but {path.name} is damaged"


def _picture(tokenizer: ImageTokenizer, codes: np.ndarray) -> np.ndarray:
    codes = torch.from_numpy(codes.astype(np.int64))
    pixels = tokenizer.decode(codes if len(codes) == 1 else codes[None])
    return (pixels[0] if len(codes) == 1 else pixels[0, 0]).cpu().numpy()


def image_tokenizer_of(shards: TokenShards, folder: Path | None, device: torch.device) -> ImageTokenizer:
    """Open the image tokenizer that shards were made with.

    Args:
        shards: opened.
        folder: its folder. None means the one in the shards, or the one that they name.
        device: where it runs.

    Raises:
        UserError: there is none, or it is another.
    """
    recorded = shards.manifest.get("image_tokenizer") or {}
    if folder is None and codebook_file(shards.folder) is not None:
        folder = shards.folder
    if folder is None and not recorded:
        raise UserError(f"{_IMAGE_TOKENIZER}: {shards.folder} does not say which one it was made with; give its folder")
    with error_context(_IMAGE_TOKENIZER):
        path, weights = folder or Path(recorded["folder"]), recorded.get("weights") if folder is None else None
        tokenizer = open_image_tokenizer(path, device, shards.vocabulary.scales, weights)
        if recorded and tokenizer.fingerprint() != recorded["fingerprint"]:
            raise UserError(
                f"{folder or recorded['folder']} is not the one that {shards.folder} was made with; the pictures would "
                "mean nothing"
            )
    return tokenizer
