"""Write and read what a checkpoint says besides tensors: ``checkpoint.json``, and the state that Megatron-LM reads.

``load_checkpoint`` of Megatron-LM 0.19 reads from it the iteration, the layout and the arguments that the model was
built with (``check_checkpoint_args``, ``load_args_from_checkpoint``).
"""

from __future__ import annotations

import hashlib
from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_cca.checkpoint import layout
from megatron_cca.config import Config, ModelConfig, TrainingConfig
from megatron_cca.config.former import of_today
from megatron_cca.config.load import config_from_dict, config_to_dict
from megatron_cca.errors import UserError, error_context
from megatron_cca.models import explicit, resolve_architecture
from megatron_cca.models.architecture import padded_vocab_size
from megatron_cca.version import code_version

# Key of checkpoint.json: the folder or file that was imported.
IMPORTED_FROM = "imported_from"
# From version 2.0 on, Megatron-LM does not reorder the projections of query, key and value.
_CHECKPOINT_VERSION = 3.0


def summarize(config: Config, data: str | None = None) -> dict:
    """Return a summary as plain data: configuration with explicit sizes, package version, vocabulary and data.

    Args:
        config: configuration of the run, or of the model alone.
        data: fingerprint of the shards. None if this package did not train the weights.
    """
    return {
        "config": config_to_dict(explicit(config)),
        "version": code_version(),
        "vocabulary": resolve_architecture(config.model).vocabulary.fingerprint(),
        "data": data,
    }


def config_of_weights(model: ModelConfig, precision: str) -> Config:
    """Return a configuration for weights alone. Its other keys have defaults, which say nothing of these weights."""
    return Config(model=model, training=TrainingConfig(precision=precision))


def saved_config(folder: Path, key: str) -> Config:
    """Return the configuration of a whole checkpoint. For an imported one, only model and precision are taken.

    What an earlier version wrote is read with today's keys, see ``config/former.py``. In an import earlier versions
    recorded the defaults of all keys, ``data.path: digits`` among them.

    Args:
        folder: the checkpoint's own folder.
        key: the key or option that named the checkpoint, for messages.

    Raises:
        UserError: the checkpoint is not whole, or its configuration is damaged. Names the file.
    """
    summary = layout.read_summary(folder, key)
    saved = summary.get("config")
    if not isinstance(saved, dict):
        raise UserError(f"{key}: {folder / layout.SUMMARY} is damaged: it has no config; choose another checkpoint")
    with error_context(f"{key}: {folder / layout.SUMMARY}"):
        config = explicit(config_from_dict(of_today(saved)))
    return config_of_weights(config.model, config.training.precision) if _no_run_wrote(summary) else config


def recorded_fingerprint(folder: Path, key: str) -> str:
    """Return a short hash of the recorded checksums of a checkpoint's tensor files. Reads none of these files.

    The hash can differ if the same weights are saved again.

    Raises:
        UserError: the checkpoint is not whole.
    """
    files = layout.read_summary(folder, key)["files"]
    recorded = sorted((name, record["xxh3"]) for name, record in files.items() if name.endswith(".distcp"))
    return hashlib.sha256(repr(recorded).encode()).hexdigest()[:16]


def common_state(config: Config, iteration: int, *, world_size: int = 1, has_optimizer: bool = False) -> dict:
    """Return the state that Megatron-LM reads besides the tensors.

    Args:
        config: configuration of the run, or of the model alone, with explicit sizes.
        iteration: number of completed steps.
        world_size: number of ranks of the run.
        has_optimizer: whether the checkpoint holds the optimizer's state.

    Returns:
        ``args``, ``iteration`` and ``checkpoint_version``; with an optimizer also ``opt_param_scheduler``.
    """
    arguments = Namespace(
        **_model_arguments(config),
        **_layout_arguments(config, world_size),
        no_save_optim=not has_optimizer,
        # Dropout is a function of seed and step. So there is no generator state to save.
        no_save_rng=True,
    )
    state = {"args": arguments, "iteration": iteration, "checkpoint_version": _CHECKPOINT_VERSION}
    if has_optimizer:
        vars(arguments).update(_run_arguments(config, iteration))
        state["opt_param_scheduler"] = _schedule(config, iteration)
    return state


def _no_run_wrote(summary: dict[str, Any]) -> bool:
    """Return whether a checkpoint is an import. An import records its source, a run the fingerprint of its data."""
    return IMPORTED_FROM in summary and summary.get("data") is None


def _model_arguments(config: Config) -> dict:
    model, architecture = config.model, resolve_architecture(config.model)
    base, is_pyramid = architecture.rotary_base, bool(architecture.scales)
    return {
        "num_layers": architecture.num_layers,
        "hidden_size": architecture.hidden_size,
        "ffn_hidden_size": architecture.ffn_hidden_size,
        "num_attention_heads": architecture.num_attention_heads,
        "group_query_attention": True,
        "num_query_groups": architecture.num_query_groups,
        "kv_channels": architecture.kv_channels,
        "qk_layernorm": architecture.qk_layernorm,
        "seq_length": architecture.max_position_embeddings,
        "max_position_embeddings": architecture.max_position_embeddings,
        # Megatron-LM has no name for rotation over a grid, and no model of next-scale prediction; docs/checkpoints.md.
        "position_embedding_type": architecture.position_embedding,
        # Megatron-LM's default, also with rotary positions.
        "add_position_embedding": True,
        "rotary_base": int(base) if base == int(base) else base,
        "rotary_percent": 1.0,
        "rotary_interleaved": architecture.position_embedding == "rope_2d",
        "normalization": "LayerNorm" if is_pyramid else "RMSNorm",
        "norm_epsilon": architecture.layernorm_epsilon,
        "apply_layernorm_1p": False,
        "apply_query_key_layer_scaling": False,
        "swiglu": not is_pyramid,
        "squared_relu": False,
        "add_bias_linear": is_pyramid,
        "add_qkv_bias": is_pyramid or architecture.add_qkv_bias,
        "untie_embeddings_and_output_weights": True,
        "hidden_dropout": model.hidden_dropout,
        "attention_dropout": model.attention_dropout,
        "vocab_size": architecture.vocabulary.size,
        "padded_vocab_size": padded_vocab_size(architecture, model, config.parallel.tensor_model_parallel_size),
        "make_vocab_size_divisible_by": model.make_vocab_size_divisible_by,
        # Tokens are ids already.
        "tokenizer_type": "NullTokenizer",
        "bf16": config.training.precision != "fp32",
        "fp16": False,
        "ckpt_format": "torch_dist",
    }


def _layout_arguments(config: Config, world_size: int) -> dict:
    parallel = config.parallel
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    return {
        "world_size": world_size,
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size,
        "context_parallel_size": parallel.context_parallel_size,
        "data_parallel_size": world_size // (tensor * pipeline * parallel.context_parallel_size),
        "expert_model_parallel_size": 1,
        "sequence_parallel": parallel.sequence_parallel,
    }


def _run_arguments(config: Config, iteration: int) -> dict:
    training = config.training
    return {
        "seed": training.seed,
        "data_parallel_random_init": False,
        "micro_batch_size": training.micro_batch_size,
        "global_batch_size": training.global_batch_size,
        "train_iters": training.train_iters,
        "consumed_train_samples": iteration * training.global_batch_size,
        "consumed_valid_samples": 0,
        "skipped_train_samples": 0,
        "optimizer": "adam",
        "use_distributed_optimizer": config.optimizer.use_distributed_optimizer,
    }


def _schedule(config: Config, iteration: int) -> dict:
    """Return the state of Megatron-LM's ``OptimizerParamScheduler``, which counts in samples, not in steps."""
    optimizer, samples = config.optimizer, config.training.global_batch_size
    return {
        "max_lr": optimizer.lr,
        "min_lr": optimizer.min_lr,
        "lr_warmup_steps": optimizer.lr_warmup_iters * samples,
        "lr_decay_steps": max(config.training.train_iters, optimizer.lr_warmup_iters + 1) * samples,
        "lr_decay_style": optimizer.lr_decay_style,
        "num_steps": iteration * samples,
        "start_wd": optimizer.weight_decay,
        "end_wd": optimizer.weight_decay,
        "wd_incr_style": "constant",
        "wd_incr_steps": config.training.train_iters * samples,
    }
