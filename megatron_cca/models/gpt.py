"""Megatron-Core's GPTModel for an :class:`Architecture`, and its log-probability head."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import silu

from megatron_cca import platform
from megatron_cca.config import ModelConfig, ParallelConfig
from megatron_cca.models.architecture import Architecture, padded_vocab_size
from megatron_cca.models.layer_specs import layer_spec
from megatron_cca.parallel import sequence_logps


def transformer_config(
    architecture: Architecture, model: ModelConfig, parallel: ParallelConfig, precision: str
) -> TransformerConfig:
    """Megatron's configuration of the decoder; a fresh object on each call, since DDP hangs its hooks on it."""
    on_gpu = platform.current().is_cuda
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        layernorm_epsilon=architecture.layernorm_epsilon,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=silu,
        add_bias_linear=False,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=precision == "bf16",
        # The weights are filled by name afterwards (checkpoint or initialization.py), alike for every layout.
        perform_initialization=False,
        use_cpu_initialization=not on_gpu,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=on_gpu,
        bias_dropout_fusion=on_gpu,
        apply_rope_fusion=False,
    )


def build_gpt(
    architecture: Architecture, model: ModelConfig, parallel: ParallelConfig, precision: str
) -> torch.nn.Module:
    """This rank's pipeline stage, on its device, with uninitialised weights.

    Model parallelism must be initialised. In bf16 the model is wrapped in Megatron's ``Float16Module``.
    """
    config = transformer_config(architecture, model, parallel, precision)
    gpt = GPTModel(
        config=config,
        transformer_layer_spec=layer_spec(
            model.transformer_impl, architecture.num_layers // parallel.pipeline_model_parallel_size
        ),
        vocab_size=padded_vocab_size(architecture, model, parallel.tensor_model_parallel_size),
        max_sequence_length=architecture.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=True,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_base=architecture.rotary_base,
    ).to(platform.device())
    return Float16Module(config, gpt) if precision == "bf16" else gpt


def image_logps(model: torch.nn.Module, tokens: Tensor, targets: Tensor, mask: Tensor, vocab_size: int) -> Tensor:
    """One forward pass of a pipeline stage.

    Args:
        model: a stage from :func:`build_gpt`, bare or wrapped in DDP.
        tokens: int64 ``[B, S]``.
        targets: int64 ``[B, S]``, the next token at each position.
        mask: bool ``[B, S]``, true where the target is an image token.
        vocab_size: the true vocabulary size.

    Returns:
        On the last pipeline stage the log-probability of each row's image tokens, float32 ``[B]``; on earlier stages
        the hidden states that Megatron's schedule sends on.
    """
    positions = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
    context = {"targets": targets, "mask": mask, "vocab_size": vocab_size}
    return model(tokens, positions, None, output_processor=_logps_head, output_processor_context=context)


def _logps_head(*, hidden_states: Tensor, output_layer, config, context: dict, **_unused) -> Tensor:
    tp_group = parallel_state.get_tensor_model_parallel_group()
    if config.sequence_parallel:
        # sequence_logps returns the whole gradient of its input on every rank; summing again would double it.
        hidden_states = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=False)
    return sequence_logps(hidden_states, output_layer.weight, tp_group=tp_group, **context)
