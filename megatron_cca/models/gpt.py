"""Megatron-Core's GPTModel for an :class:`Architecture`, and its log-probability head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor
from torch.nn.functional import silu

from megatron_cca import platform
from megatron_cca.config import KernelsConfig, ModelConfig, ParallelConfig, TrainingConfig
from megatron_cca.megatron_compat.layers import await_parameters
from megatron_cca.models.architecture import Architecture, padded_output_size, padded_vocab_size
from megatron_cca.models.layers import fuse_weight_gradients, kernel_options, layer_spec
from megatron_cca.parallel import sequence_logps

_DEFAULT_KERNELS = KernelsConfig()


def build_gpt(
    architecture: Architecture,
    model: ModelConfig,
    parallel: ParallelConfig,
    training: TrainingConfig,
    *,
    kernels: KernelsConfig = _DEFAULT_KERNELS,
    is_frozen: bool = False,
) -> list[torch.nn.Module]:
    """Build this rank's model chunks on its device, with uninitialised weights.

    Model parallelism must be initialised. The arguments are those of :func:`transformer_config`. Except for fp32, each
    chunk is wrapped in Megatron's ``Float16Module``. The chunks share one configuration, as Megatron's schedules
    expect. Under ``torch.device("meta")`` the weights are on the meta device.

    Returns:
        One chunk, or several for the interleaved schedule.
    """
    config = transformer_config(architecture, model, parallel, training, kernels=kernels, is_frozen=is_frozen)
    chunks = num_model_chunks(parallel)
    stages = range(chunks) if chunks > 1 else [None]
    built = [_build_chunk(config, architecture, model, parallel, vp_stage) for vp_stage in stages]
    for chunk in built:
        fuse_weight_gradients(chunk, kernels, is_frozen=is_frozen)
    return built


def transformer_config(
    architecture: Architecture,
    model: ModelConfig,
    parallel: ParallelConfig,
    training: TrainingConfig,
    *,
    kernels: KernelsConfig = _DEFAULT_KERNELS,
    is_frozen: bool = False,
) -> TransformerConfig:
    """Return Megatron's configuration of the decoder. Each call makes a new object, because DDP puts its hooks on it.

    Args:
        architecture: sizes of the model.
        model, parallel, training, kernels: sections of the run's configuration. ``training`` has precision and
            recomputation.
        is_frozen: whether the weights never change.

    Raises:
        UserError: the precision is FP8, and this device does not support it.
    """
    if training.precision == "fp8":
        from megatron_cca.models.fp8_devices import check_fp8_device

        check_fp8_device(training.fp8_recipe)
    on_gpu = platform.current().is_cuda
    dtype = torch.float32 if training.precision == "fp32" else torch.bfloat16
    interleaved = num_model_chunks(parallel) > 1
    overlaps_p2p = interleaved if parallel.overlap_p2p_comm is None else parallel.overlap_p2p_comm
    recompute_layers = training.recompute_granularity == "full"
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        kv_channels=architecture.kv_channels,
        qk_layernorm=architecture.qk_layernorm,
        add_qkv_bias=architecture.add_qkv_bias,
        layernorm_epsilon=architecture.layernorm_epsilon,
        rotary_interleaved=architecture.position_embedding == "rope_2d",
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=num_model_chunks(parallel) if interleaved else None,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        tp_comm_overlap=parallel.tp_comm_overlap,
        microbatch_group_size_per_vp_stage=parallel.microbatch_group_size_per_vp_stage,
        deallocate_pipeline_outputs=parallel.deallocate_pipeline_outputs,
        # With two pipeline ranks, both neighbours are the same rank. Megatron's batched send/receive matches messages
        # only by their order. It then silently mixes up the two directions.
        batch_p2p_comm=not interleaved,
        overlap_p2p_comm=overlaps_p2p,
        recompute_granularity=training.recompute_granularity,
        recompute_modules=list(training.recompute_modules),
        recompute_method=training.recompute_method if recompute_layers else None,
        recompute_num_layers=training.recompute_num_layers if recompute_layers else None,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp8=training.fp8_format if training.precision == "fp8" else None,
        fp8_recipe=training.fp8_recipe,
        fp8_amax_history_len=training.fp8_amax_history_len,
        fp8_amax_compute_algo=training.fp8_amax_compute_algo,
        # For a frozen model, Transformer Engine would permanently keep an FP8 copy of every weight.
        disable_parameter_transpose_cache=is_frozen,
        # The weights are filled by name later (checkpoint or initialization.py), identically for every layout.
        perform_initialization=False,
        # Otherwise Megatron creates weights on the GPU by name, and ignores torch.device("meta").
        use_cpu_initialization=not on_gpu or torch.get_default_device().type == "meta",
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        **kernel_options(kernels, is_frozen=is_frozen) | _block_options(architecture),
    )


def _block_options(architecture: Architecture) -> dict[str, Any]:
    if architecture.scales:
        from megatron_cca.models.next_scale import block_options

        return block_options()
    return {
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": silu,
        "add_bias_linear": False,
    }


def num_model_chunks(parallel: ParallelConfig) -> int:
    """Return the number of model chunks on each pipeline rank. More than 1 means the interleaved schedule."""
    return parallel.virtual_pipeline_model_parallel_size or 1


def image_logps(
    model: torch.nn.Module,
    tokens: Tensor | None,
    targets: Tensor | None,
    mask: Tensor | None,
    *,
    logps_of: Callable[..., Tensor] | None = None,
    **head: Any,
) -> Tensor:
    """Run one forward pass of a model chunk. A chunk without the first and the last layers needs no tokens.

    Args:
        model: a chunk from :func:`build_gpt`, bare or wrapped in DDP.
        tokens: int64 ``[B, S]``, the whole sequences, also under context parallelism.
        targets: int64 ``[B, S]``, the next token at each position.
        mask: bool ``[B, S]``, true if the target is an image token.
        logps_of: makes log-probabilities of the last hidden states. None means :func:`sequence_logps`. ``token_logps``
            makes the terms of its sum, float32 ``[B, S]``; no context-parallel rank has a whole row of them.
        head: ``vocab_size``, ``support`` and ``chunk_size`` of :func:`sequence_logps`.

    Returns:
        On the last chunk of the pipeline: the log-probability of each row's image tokens, float32 ``[B]``, the same on
        all tensor- and context-parallel ranks. On earlier chunks: the hidden states that Megatron's schedule sends to
        the next chunk.
    """
    return _forward(model, tokens, targets, mask, logps_of=logps_of or sequence_logps, **head)


def _build_chunk(
    config: TransformerConfig,
    architecture: Architecture,
    model: ModelConfig,
    parallel: ParallelConfig,
    vp_stage: int | None,
) -> torch.nn.Module:
    pipeline_chunks = parallel.pipeline_model_parallel_size * num_model_chunks(parallel)
    place = {"ignore_virtual": False, "vp_stage": vp_stage}
    layers = layer_spec(
        model.transformer_impl,
        architecture.num_layers // pipeline_chunks,
        channels=architecture.kv_channels,
        qk_layernorm=architecture.qk_layernorm,
        precision="fp32" if config.params_dtype == torch.float32 else "bf16",
        scales=architecture.scales,
    )
    tensor = parallel.tensor_model_parallel_size
    gpt = _model_class(architecture)(
        config=config,
        transformer_layer_spec=layers,
        vocab_size=padded_output_size(architecture, model, tensor),
        max_sequence_length=architecture.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(**place),
        post_process=parallel_state.is_pipeline_last_stage(**place),
        parallel_output=True,
        share_embeddings_and_output_weights=False,
        position_embedding_type="none" if architecture.position_embedding == "learned" else "rope",
        rotary_base=architecture.rotary_base,
        vp_stage=vp_stage,
    )
    if architecture.position_embedding == "rope_2d":
        from megatron_cca.models.rotary_2d import use_grid_positions

        use_grid_positions(gpt, architecture)
    if architecture.scales:
        gpt.prepare(architecture)
    if architecture.image_embedding_channels:
        gpt.prepare(architecture, padded_vocab_size(architecture, model, tensor))
    if platform.current().is_cuda and not next(gpt.parameters()).is_meta:
        gpt = gpt.to(platform.device())
    return Float16Module(config, gpt) if config.bf16 else gpt


def _model_class(architecture: Architecture) -> type[GPTModel]:
    if architecture.scales:
        from megatron_cca.models.next_scale import NextScaleModel

        return NextScaleModel
    if architecture.image_embedding_channels:
        from megatron_cca.models.image_head import ImageHeadModel

        return ImageHeadModel
    return GPTModel


def _forward(
    model: torch.nn.Module, tokens: Tensor | None, targets: Tensor | None, mask: Tensor | None, **context
) -> Tensor:
    if tokens is None:
        return model(None, None, None)
    tokens, targets, mask = _on_this_context_rank(tokens, targets, mask)
    # Megatron requires this argument but does not use it: rotary positions are the index in the whole sequence.
    positions = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
    context = {"targets": targets, "mask": mask, **context}
    return model(tokens, positions, None, output_processor=_logps_head, output_processor_context=context)


def _on_this_context_rank(*batch: Tensor) -> tuple[Tensor, ...]:
    group = parallel_state.get_context_parallel_group()
    if group.size() == 1:
        return batch
    parts = get_batch_on_this_cp_rank(dict(enumerate(batch)), is_hybrid_cp=False, cp_group=group)
    return tuple(parts[index] for index in range(len(batch)))


def _logps_head(*, hidden_states: Tensor, output_layer, config, context: dict, **_unused) -> Tensor:
    tp_group = parallel_state.get_tensor_model_parallel_group()
    await_parameters(output_layer)
    if config.sequence_parallel:
        # sequence_logps returns the whole gradient of its input on every rank. Another sum would count it twice.
        hidden_states = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=False)
    logps_of, batch = context["logps_of"], {name: value for name, value in context.items() if name != "logps_of"}
    logps = logps_of(hidden_states, output_layer.weight, bias=output_layer.bias, tp_group=tp_group, **batch)
    if config.context_parallel_size == 1:
        return logps
    # Each rank has the sum and the gradient of its own part of the sequence. Megatron's data parallelism sums parameter
    # gradients over these ranks.
    return reduce_from_tensor_model_parallel_region(logps, parallel_state.get_context_parallel_group())


def unwrapped_gpt(chunk: torch.nn.Module) -> GPTModel:
    """Return the model in a chunk, which may be in DDP, in Float16Module or bare."""
    return next(module for module in chunk.modules() if isinstance(module, GPTModel))
