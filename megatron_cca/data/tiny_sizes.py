"""The sizes that a tiny preset takes from the shards it is trained on, where its configuration leaves them out.

So a data set of any codebook, classes and grid can be tried without anything being calculated. The manifest names the
preset and the sizes of the vocabulary. The positions are those of the longest row.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_cca.config import Config, ModelConfig
from megatron_cca.data import is_tiny
from megatron_cca.data.manifest import FILE_NAME, Json, meta_ids, read_manifest, read_table
from megatron_cca.errors import UserError, error_context
from megatron_cca.models import resolve_architecture
from megatron_cca.models.architecture import Architecture, sequence_multiple
from megatron_cca.models.image_vocabulary import ImageVocabulary

MODEL = "model"
_SAID: set[str] = set()
_SIZES = ("codebook_size", "num_classes")


def recorded_model(folder: Path, manifest: Json) -> ModelConfig | None:
    """Return the preset and the sizes in the manifest of a shard folder. None where there are none.

    Raises:
        UserError: the entry is damaged; names the file.
    """
    entry = manifest.get(MODEL)
    if entry is None:
        return None
    sizes = {key: entry.get(key) for key in _SIZES} if isinstance(entry, dict) else {}
    known = isinstance(entry, dict) and isinstance(entry.get("name"), str) and set(entry) <= {"name", *_SIZES}
    if not known or not all(size is None or (type(size) is int and 0 < size < 2**31) for size in sizes.values()):
        raise UserError(f"{folder / FILE_NAME}: {MODEL} must hold a name and sizes; tokenize the data again")
    return ModelConfig(name=entry["name"], **sizes)


def model_entry(name: str, vocabulary: ImageVocabulary) -> Json | None:
    """Return the entry of a manifest that :func:`recorded_model` reads. None for a preset that is not tiny."""
    if not is_tiny(name):
        return None
    sizes = {key: getattr(vocabulary, key) for key in _SIZES}
    return {"name": name} | {key: size for key, size in sizes.items() if size is not None}


def with_sizes_of(config: Config, folders: Sequence[Path]) -> Config:
    """Return the configuration with the sizes that it leaves out and that differ from the preset's.

    The first process says which.

    Args:
        config: of a run of a tiny preset.
        folders: its shards. Those without recorded sizes do not count.

    Raises:
        UserError: shards of another preset, or folders that differ; names the folder.
    """
    with error_context("data.path"):
        sizes: dict[str, int] = {}
        for folder in folders:
            for key, size in _sizes_of(config, folder).items():
                if key != "max_position_embeddings" and sizes.setdefault(key, size) != size:
                    raise UserError(f"{folder} is for {key} {size}, {folders[0]} for {sizes[key]}; give shards of one")
                sizes[key] = max(size, sizes.get(key, 0))
    preset = resolve_architecture(ModelConfig(name=config.model.name))
    own = {key: getattr(preset.vocabulary if key in _SIZES else preset, key) for key in sizes}
    taken = {key: size for key, size in sizes.items() if size != own[key] and getattr(config.model, key) is None}
    if taken and os.environ.get("RANK", "0") == "0":
        _say_once(taken, ", ".join(map(str, folders)))
    return replace(config, model=replace(config.model, **taken))


def _say_once(taken: dict[str, int], folders: str) -> None:
    shown = ", ".join(f"model.{key} {size}" for key, size in taken.items())
    line = f"{shown}: taken from {folders}, since the configuration leaves them out"
    # The configurations of a study are many, of one model.
    if line not in _SAID:
        print(line, flush=True)
    _SAID.add(line)


def _sizes_of(config: Config, folder: Path) -> dict[str, int]:
    manifest = read_manifest(folder)
    model = recorded_model(folder, manifest)
    if model is None:
        return {}
    if model.name != config.model.name:
        raise UserError(f"{folder} is for {model.name}, model.name is {config.model.name}; set that, or tokenize again")
    architecture = resolve_architecture(model)
    sizes = {key: getattr(model, key) for key in _SIZES if getattr(model, key) is not None}
    table = read_table(folder, manifest["num_samples"])
    if not len(table) or architecture.scales:
        return sizes
    multiple = sequence_multiple(config.parallel, config.data.pad_to_multiple_of)
    return sizes | {"max_position_embeddings": _positions(architecture, table, meta_ids(manifest), multiple)}


def _positions(architecture: Architecture, table: np.ndarray, meta: dict, multiple: int) -> int:
    """Return the positions of the longest row, at least the preset's where any grid may come."""
    grids, places = np.unique(table["grid"], axis=0, return_inverse=True)
    words = np.array([len(meta.get(tuple(grid), ())) for grid in grids.tolist()])[places.reshape(-1)]
    frames, heights, widths = table["grid"].astype(np.int64).T
    vocabulary = architecture.vocabulary
    longest = int(vocabulary.sequence_length(table["caption_length"], words, heights, widths, frames).max())
    if architecture.position_embedding == "rope_2d":
        return longest
    return max(architecture.max_position_embeddings, -(-longest // multiple) * multiple)
