"""A model for sampling, from any checkpoint."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist

from megatron_cca.checkpoint import distributed, layout
from megatron_cca.checkpoint.summary import saved_config
from megatron_cca.config import ParallelConfig
from megatron_cca.errors import UserError, said_of
from megatron_cca.models import resolve_architecture
from megatron_cca.models.architecture import Architecture, check_layout
from megatron_cca.models.emu3.vocabulary import Emu3Vocabulary
from megatron_cca.models.gpt import build_gpt


def load_for_sampling(checkpoint: str) -> tuple[torch.nn.Module, Architecture]:
    """The whole model of a checkpoint, split over all ranks of this job by tensor parallelism.

    The process group and Megatron's groups must be initialised with tensor parallelism over all ranks.

    Raises:
        UserError: no whole checkpoint there, or one that this many ranks cannot split.
    """
    key = "checkpoint"
    folder = layout.resolve(checkpoint, key)
    config = saved_config(folder, key)
    architecture = resolve_architecture(config.model)
    if not isinstance(architecture.vocabulary, Emu3Vocabulary):
        raise UserError(
            f"{key}: {folder} has a vocabulary of {architecture.vocabulary.size}, whose image tokens are not known; "
            "nothing can be drawn with it"
        )
    parallel = ParallelConfig(tensor_model_parallel_size=dist.get_world_size())
    with said_of(f"{key}: {folder} cannot be sampled on {dist.get_world_size()} ranks"):
        check_layout(architecture, config.model, parallel)
    model_config = replace(config.model, hidden_dropout=0.0, attention_dropout=0.0)
    chunks = build_gpt(architecture, model_config, parallel, config.training)
    distributed.load_weights(folder, chunks, key)
    return chunks[0].requires_grad_(False), architecture
