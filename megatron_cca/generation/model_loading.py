"""Load a model for sampling, and its tokenizers, from a Megatron checkpoint or a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_cca.checkpoint import distributed, layout
from megatron_cca.checkpoint.fingerprint import files_fingerprint
from megatron_cca.checkpoint.huggingface.huggingface_checkpoint import HuggingFaceCheckpoint
from megatron_cca.checkpoint.huggingface.importing import gathered_rows
from megatron_cca.checkpoint.summary import config_of_weights, recorded_fingerprint, saved_config
from megatron_cca.config import Config, ParallelConfig, Precision
from megatron_cca.data.codebooks import codebook_file, open_patch_tokenizer
from megatron_cca.data.digits import data_folders
from megatron_cca.data.manifest import FILE_NAME as MANIFEST
from megatron_cca.data.manifest import read_manifest
from megatron_cca.data.tokenizers import (
    TIKTOKEN_FILE,
    TOKENIZER_FILE,
    TextTokenizer,
    check_scales,
    open_image_tokenizer,
    open_text_tokenizer,
)
from megatron_cca.errors import UserError, error_context
from megatron_cca.models import family_of, resolve_architecture
from megatron_cca.models.architecture import Architecture, check_layout, only_grid
from megatron_cca.models.formats import ImageTokenizer
from megatron_cca.models.gpt import build_gpt
from megatron_cca.models.image_vocabulary import ImageVocabulary
from megatron_cca.models.initialization import sharded_tensors
from megatron_cca.models.weight_files import CONFIG
from megatron_cca.models.weight_map import MappedTensor

TOKENIZER_OPTIONS = ("--text-tokenizer", "--image-tokenizer")
_CHECKPOINT = "checkpoint"


@dataclass(frozen=True)
class SamplingModel:
    """A frozen model, split over the ranks of a replica.

    Attributes:
        chunks: this rank's.
        architecture: its sizes and vocabulary.
        config: the configuration of the run that made the checkpoint.
        folder: the checkpoint's own folder, or the Hugging Face folder.
        is_huggingface: whether ``folder`` is a Hugging Face folder.
    """

    chunks: list[torch.nn.Module]
    architecture: Architecture
    config: Config
    folder: Path
    is_huggingface: bool


def is_huggingface(checkpoint: str) -> bool:
    """Return whether a folder is a Hugging Face checkpoint."""
    return (Path(checkpoint) / CONFIG).is_file()


@dataclass(frozen=True)
class InspectedCheckpoint:
    """A checkpoint whose configuration is read and whose weights are not.

    Attributes:
        source: a checkpoint's own folder, or the Hugging Face checkpoint.
        config, architecture, folder: as :class:`SamplingModel` has them.
    """

    source: HuggingFaceCheckpoint | Path
    config: Config
    architecture: Architecture
    folder: Path


def inspect_for_sampling(checkpoint: str, parallel: ParallelConfig | None = None) -> InspectedCheckpoint:
    """Inspect a checkpoint, and refuse one that cannot be sampled on a layout.

    Args:
        checkpoint: see :func:`load_for_sampling`.
        parallel: the layout. None means that of Megatron's process groups. With a layout, no process groups are needed.

    Raises:
        UserError: no checkpoint there, no known image tokens, or a layout that cannot split it.
    """
    if is_huggingface(checkpoint):
        source = HuggingFaceCheckpoint(Path(checkpoint), _CHECKPOINT)
        config = config_of_weights(source.model, source.precision)
        folder = source.folder
    else:
        source = folder = layout.resolve(checkpoint, _CHECKPOINT)
        config = saved_config(folder, _CHECKPOINT)
    architecture = resolve_architecture(config.model)
    if not isinstance(architecture.vocabulary, ImageVocabulary):
        raise UserError(
            f"{_CHECKPOINT}: {folder} has a vocabulary of {architecture.vocabulary.size}, whose image tokens are not "
            "known; nothing can be drawn with it"
        )
    with error_context(f"{_CHECKPOINT}: {folder} cannot be sampled so"):
        check_layout(architecture, config.model, parallel or _parallel_config_of_the_job())
    return InspectedCheckpoint(source, config, architecture, folder)


def sampling_precision(config: Config, precision: Precision | None) -> str:
    """Return the precision that a checkpoint's model is sampled in. None means the checkpoint's, with FP8 as bf16."""
    return precision or ("bf16" if config.training.precision == "fp8" else config.training.precision)


def weights_of(checkpoint: InspectedCheckpoint) -> str:
    """Return a short hash of a checkpoint's weights: what a run that starts from it records, or of a folder's files.

    Only the files of a Hugging Face folder are read.

    Raises:
        UserError: the checkpoint is not whole.
    """
    if isinstance(checkpoint.source, HuggingFaceCheckpoint):
        return files_fingerprint(sorted({tensor.file for tensor in checkpoint.source.files.tensors.values()}))
    return recorded_fingerprint(checkpoint.folder, _CHECKPOINT)


def load_for_sampling(checkpoint: str | InspectedCheckpoint, precision: Precision | None = None) -> SamplingModel:
    """Load the model of a checkpoint, split over Megatron's process groups.

    Any TP x PP will do, whatever the layout in training was. The model has Megatron's local layers on every device.
    LoRA adapters are merged into its weights. Collective over all ranks. Process groups must be initialised.

    Args:
        checkpoint: a run folder, an ``iter_`` folder, a Hugging Face folder, or one inspected already.
        precision: ``fp32`` or ``bf16``. None means the checkpoint's own, with FP8 as bf16.

    Raises:
        UserError: no whole checkpoint there, no known image tokens, or a layout that cannot split it.
    """
    found = inspect_for_sampling(checkpoint) if isinstance(checkpoint, str) else checkpoint
    config = found.config
    training = replace(config.training, precision=sampling_precision(config, precision), recompute_granularity=None)
    model = replace(config.model, hidden_dropout=0.0, attention_dropout=0.0, transformer_impl="local")
    chunks = build_gpt(found.architecture, model, _parallel_config_of_the_job(), training, is_frozen=True)
    is_of_hf = isinstance(found.source, HuggingFaceCheckpoint)
    if is_of_hf:
        load_huggingface_weights(found.source, chunks)
    else:
        distributed.load_weights(found.source, chunks, _CHECKPOINT)
    frozen = [chunk.requires_grad_(False) for chunk in chunks]
    return SamplingModel(frozen, found.architecture, config, found.folder, is_of_hf)


@torch.no_grad()
def load_huggingface_weights(source: HuggingFaceCheckpoint, chunks: Sequence[torch.nn.Module]) -> None:
    """Load weights into this rank's model chunks, one tensor at a time. Rows that pad the vocabulary become zeros.

    Args:
        source: a checkpoint of the same sizes as the chunks.
        chunks: chunks from :func:`megatron_cca.models.gpt.build_gpt`, in any precision.

    Raises:
        UserError: a file is damaged.
    """
    tensors = {(tensor.key, tensor.layer): tensor for tensor in source.format.weights.tensors(source.architecture)}
    for chunk in chunks:
        for shard in sharded_tensors(chunk.sharded_state_dict()):
            layer = shard.global_offset[0] if shard.prepend_axis_num else None
            _fill_shard(shard, source, tensors[shard.key, layer])


@dataclass(frozen=True)
class Tokenizers:
    """Both tokenizers of a model.

    Attributes:
        text: None where captions are classes.
        images: the image tokenizer.
        images_path, images_weights: where that is, see :func:`open_image_tokenizer`.
    """

    text: TextTokenizer | None
    images: ImageTokenizer
    images_path: Path
    images_weights: Path | None = None


def open_tokenizers(
    checkpoint: Path,
    config: Config,
    vocabulary: ImageVocabulary,
    *,
    text: Path | None = None,
    images: Path | None = None,
    device: str | torch.device = "cpu",
    options: tuple[str, str] = TOKENIZER_OPTIONS,
) -> Tokenizers:
    """Return the tokenizers of a checkpoint.

    Args:
        checkpoint: its own folder, or a Hugging Face folder.
        config: the checkpoint's configuration. Its ``data.path`` is searched last.
        vocabulary: which the tokenizers must fit.
        text, images: folders that the user named. None means to search for them.
        device: of the image tokenizer.
        options: the options that name them, for messages.

    Raises:
        UserError: none found, a damaged one, or one that does not fit the vocabulary; names option or folder.
    """
    with error_context(options[0]):
        text_tokenizer = _text_tokenizer(checkpoint, config, vocabulary, text)
    scales = resolve_architecture(config.model).scales
    with error_context(options[1]):
        if images is not None:
            place = images, None
            tokenizer = open_image_tokenizer(images, device, scales)
        else:
            tokenizer, *place = _own_image_tokenizer(checkpoint, config, device, scales)
        if tokenizer.codebook_size != vocabulary.codebook_size:
            raise UserError(
                f"has a codebook of {tokenizer.codebook_size}, the model one of {vocabulary.codebook_size}; give the "
                "model's own"
            )
        check_scales(tokenizer, scales)
    return Tokenizers(text_tokenizer, tokenizer, *place)


def default_grid(config: Config) -> tuple[int, int]:
    """Return height and width, in visual tokens, of the images that a model draws.

    A model of one grid has that one. For other models it is the only grid of the training data. Where the data are
    unknown, missing or of several grids, it is the grid of the released model.

    Raises:
        UserError: the released grid is needed, but the model has none or has too few positions for it.
    """
    architecture = resolve_architecture(config.model)
    own = only_grid(architecture)
    if own is not None:
        return own
    grids = {grid for folder in data_folders(config) if (folder / MANIFEST).is_file() for grid in _grids(folder)}
    if len(grids) == 1:
        return grids.pop()
    released = architecture.vocabulary.released_grid
    if released is not None and _fits(architecture, *released):
        return released
    if config.data.path is None:
        seen = "the checkpoint does not say what images the model was trained on"
    else:
        seen = f"the model was trained on {f'{len(grids)} sizes' if grids else 'data that are not here'}"
    raise UserError(f"{seen}; give height and width in visual tokens, such as 16 16")


def _parallel_config_of_the_job() -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
    )


def _fill_shard(shard: ShardedTensor, source: HuggingFaceCheckpoint, tensor: MappedTensor) -> None:
    offset = shard.global_offset[shard.prepend_axis_num :]
    rows, *columns = shard.local_shape
    start = offset[0]
    stop = min(start + rows, tensor.num_rows)
    found = gathered_rows(source, tensor, start, stop) if start < stop else None
    shard.data.zero_()
    if found is not None:
        part = found[:, offset[1] : offset[1] + columns[0]] if columns else found
        shard.data.view(rows, *columns)[: stop - start] = part.to(shard.data.device)


def _fits(architecture: Architecture, height: int, width: int) -> bool:
    length = architecture.vocabulary.sequence_length(0, 0, height, width)
    return length <= architecture.max_position_embeddings


def _grids(folder: Path) -> Iterator[tuple[int, int]]:
    for key in read_manifest(folder)["meta_words"]:
        frames, height, width = map(int, key.split("x"))
        if frames == 1:
            yield height, width


def _text_tokenizer(
    checkpoint: Path, config: Config, vocabulary: ImageVocabulary, folder: Path | None
) -> TextTokenizer | None:
    if vocabulary.num_classes is not None:
        if folder is not None:
            raise UserError("this model takes classes, not texts; leave it out")
        return None
    tokenizer = open_text_tokenizer(folder) if folder is not None else _own_text_tokenizer(checkpoint, config)
    if tokenizer.size > vocabulary.text_size:
        raise UserError(f"has {tokenizer.size} ids, the model {vocabulary.text_size}; give the model's own")
    return tokenizer


def _own_text_tokenizer(checkpoint: Path, config: Config) -> TextTokenizer:
    for folder in (checkpoint, checkpoint / layout.COMPANION_FILES, *data_folders(config)):
        if (folder / TOKENIZER_FILE).is_file() or (folder / TIKTOKEN_FILE).is_file():
            return open_text_tokenizer(folder)
    lacking = f"{checkpoint} has no text tokenizer with it"
    if config.data.path is not None:
        lacking = f"neither {checkpoint} nor the data it was trained on has a text tokenizer"
    raise UserError(f"{lacking}; give a folder with {TOKENIZER_FILE} or {TIKTOKEN_FILE}")


def _own_image_tokenizer(
    checkpoint: Path, config: Config, device: str | torch.device, scales: tuple[int, ...]
) -> tuple[ImageTokenizer, Path, Path | None]:
    """Return the image tokenizer that belongs to a checkpoint, its path, and the folder of its tensors if apart."""
    kept, weights = checkpoint / layout.COMPANION_FILES, checkpoint / layout.COMPANION_TENSORS
    files = family_of(config.model).image_tokenizer
    if weights.is_dir():
        return files.open(kept, device, weights), kept, weights
    if files is not None and not layout.is_checkpoint(checkpoint) and files.recognises(checkpoint):
        try:
            return files.open(checkpoint, device, scales=scales), checkpoint, None
        except UserError:
            pass  # a folder of the decoder alone; its image tokenizer is elsewhere
    for folder in data_folders(config):
        if codebook_file(folder) is not None:
            return open_patch_tokenizer(folder), folder, None
    wanted = "its folder" if files is None else files.description
    raise UserError(f"{checkpoint} has no image tokenizer with it; give {wanted}")
