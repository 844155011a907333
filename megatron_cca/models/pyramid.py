"""The sizes and layouts of models of next-scale prediction, whose images are pyramids of code grids. Needs no torch."""

from __future__ import annotations

import json

from megatron_cca.config import Config, ModelConfig, ParallelConfig
from megatron_cca.errors import UserError
from megatron_cca.models.architecture import Architecture


def num_codes(scales: tuple[int, ...]) -> int:
    """Return the number of codes of an image."""
    return sum(side**2 for side in scales)


def check_sizes(architecture: Architecture, preset: Architecture) -> None:
    """Refuse sizes that do not fit the scales, or that such a model does not have.

    Args:
        architecture: the preset, with the sizes that the configuration sets.
        preset: as it is.

    Raises:
        UserError: another number of positions, heads that share keys, an option of a decoder's attention, or a rotary
            base. Names the key.
    """
    wanted = architecture.prefix_tokens + num_codes(architecture.scales)
    if architecture.max_position_embeddings != wanted:
        sides = ", ".join(map(str, architecture.scales))
        raise UserError(
            f"model.max_position_embeddings: {architecture.max_position_embeddings}, but the class and the codes of "
            f"grids of {sides} are {wanted}; leave it out"
        )
    if architecture.num_query_groups != architecture.num_attention_heads:
        raise UserError(
            f"model.num_query_groups: {architecture.num_query_groups}, but every head has keys of its own here; use "
            f"{architecture.num_attention_heads}"
        )
    for key, value in architecture.attention_options.items():
        raise UserError(
            f"model.{key}: {json.dumps(value)}, but the layers here have an attention of their own; leave it out"
        )
    if architecture.rotary_base != preset.rotary_base:
        raise UserError(f"model.rotary_base: {architecture.rotary_base}, but positions are learned here; leave it out")


def check_next_scale_layout(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Refuse a layout that such a model cannot have.

    Raises:
        UserError: a pipeline, context parallelism, or dropout of hidden states. Names the key.
    """
    for key, why in (
        ("pipeline_model_parallel_size", "every layer takes the class, which a pipeline does not send"),
        ("context_parallel_size", "the positions of a scale see each other, which no part of a row can"),
    ):
        if getattr(parallel, key) > 1:
            raise UserError(f"parallel.{key}: {getattr(parallel, key)}, but in {model.name} {why}; use 1")
    if model.hidden_dropout:
        raise UserError(
            f"model.hidden_dropout: {model.hidden_dropout}, but the layers of {model.name} have none; use 0"
        )


def check_next_scale_kernels(config: Config) -> None:
    """Refuse kernels, graphs and overlaps of layers that such a model's layers do not have.

    Raises:
        UserError: one of them is on. Names the key.
    """
    kernels = config.kernels
    for key, is_on in (
        ("kernels.bias_activation_fusion", kernels.bias_activation_fusion),
        ("kernels.bias_dropout_fusion", kernels.bias_dropout_fusion),
        ("kernels.apply_rope_fusion", kernels.apply_rope_fusion),
        ("kernels.cuda_graph_impl", kernels.cuda_graph_impl != "none"),
        ("parallel.tp_comm_overlap", config.parallel.tp_comm_overlap),
    ):
        if is_on:
            raise UserError(f"{key}: the layers of {config.model.name} cannot have it; leave it out")


def num_parameters_of_pyramid(architecture: Architecture) -> int:
    """Return the number of trained weights of next-scale prediction: the keys have no bias."""
    hidden, ffn = architecture.hidden_size, architecture.ffn_hidden_size
    attention = 4 * hidden**2 + 3 * hidden + architecture.num_attention_heads
    feed_forward = 2 * hidden * ffn + ffn + hidden
    modulation = hidden * (hidden + 1)
    layer = attention + feed_forward + 6 * modulation
    vocabulary, scales = architecture.vocabulary, architecture.scales
    # Of the first scale, of all positions, of the scales, of the features with their bias.
    positions = architecture.max_position_embeddings - architecture.prefix_tokens
    inputs = scales[0] ** 2 + positions + len(scales) + architecture.feature_channels + 1
    rows = inputs + vocabulary.size - vocabulary.output_size
    head = vocabulary.output_size * (hidden + 1) + 2 * modulation
    return architecture.num_layers * layer + rows * hidden + head
