"""Load a model for sampling, from a Megatron checkpoint of any layout or from a Hugging Face folder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from megatron.core import parallel_state

from megatron_cca.checkpoint import distributed, layout
from megatron_cca.checkpoint.huggingface.loading import load_weights
from megatron_cca.checkpoint.huggingface.source import CONFIG, HuggingFaceCheckpoint
from megatron_cca.checkpoint.summary import config_of_weights, saved_config
from megatron_cca.config import Config, ParallelConfig, Precision
from megatron_cca.errors import UserError, error_context
from megatron_cca.models import resolve_architecture
from megatron_cca.models.architecture import Architecture, check_layout
from megatron_cca.models.gpt import build_gpt
from megatron_cca.models.image_vocabulary import ImageVocabulary

OPTION = "checkpoint"


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
        source = HuggingFaceCheckpoint(Path(checkpoint), OPTION)
        config = config_of_weights(source.model, source.precision)
        folder = source.folder
    else:
        source = folder = layout.resolve(checkpoint, OPTION)
        config = saved_config(folder, OPTION)
    architecture = resolve_architecture(config.model)
    if not isinstance(architecture.vocabulary, ImageVocabulary):
        raise UserError(
            f"{OPTION}: {folder} has a vocabulary of {architecture.vocabulary.size}, whose image tokens are not known; "
            "nothing can be drawn with it"
        )
    with error_context(f"{OPTION}: {folder} cannot be sampled so"):
        check_layout(architecture, config.model, parallel or _layout_of_the_job())
    return InspectedCheckpoint(source, config, architecture, folder)


def load_for_sampling(checkpoint: str | InspectedCheckpoint, precision: Precision | None = None) -> SamplingModel:
    """Load the model of a checkpoint, split over Megatron's process groups.

    Any TP x PP will do, whatever the layout in training was. The model has Megatron's local layers on every device.
    LoRA adapters are merged into its weights. Collective over all ranks. Process groups must be initialised.

    Args:
        checkpoint: a run folder, an ``iter_`` folder, a Hugging Face folder with safetensors, or one inspected already.
        precision: ``fp32`` or ``bf16``. None means the checkpoint's own, with FP8 as bf16.

    Raises:
        UserError: no whole checkpoint there, no known image tokens, or a layout that cannot split it.
    """
    found = inspect_for_sampling(checkpoint) if isinstance(checkpoint, str) else checkpoint
    config = found.config
    own = "bf16" if config.training.precision == "fp8" else config.training.precision
    training = replace(config.training, precision=precision or own, recompute_granularity=None)
    model = replace(config.model, hidden_dropout=0.0, attention_dropout=0.0, transformer_impl="local")
    chunks = build_gpt(found.architecture, model, _layout_of_the_job(), training, is_frozen=True)
    is_of_hf = isinstance(found.source, HuggingFaceCheckpoint)
    if is_of_hf:
        load_weights(found.source, chunks)
    else:
        distributed.load_weights(found.source, chunks, OPTION)
    frozen = [chunk.requires_grad_(False) for chunk in chunks]
    return SamplingModel(frozen, found.architecture, config, found.folder, is_of_hf)


def _layout_of_the_job() -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
    )
