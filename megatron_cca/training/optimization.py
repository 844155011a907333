"""Wrap the policy in Megatron's data parallelism, and build its optimizer and its learning-rate schedule."""

from __future__ import annotations

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import get_model_config

from megatron_cca.config import Config
from megatron_cca.models.gpt import num_model_chunks
from megatron_cca.training import checks

# Megatron's spelling of an FP8 state is uint8.
_STATE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.uint8}


def wrap_ddp(chunks: list[torch.nn.Module], config: Config) -> list[DistributedDataParallel]:
    """Wrap each chunk in Megatron's data parallelism, and set the hooks that Megatron's schedules call."""
    options, interleaved = config.optimizer, num_model_chunks(config.parallel) > 1
    # Stages that gather at different times would delay each other in every cycle of the interleaved schedule. The
    # schedule therefore starts the gathering itself.
    aligned = options.overlap_param_gather and interleaved
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=options.grad_reduce_in_fp32,
        overlap_grad_reduce=options.overlap_grad_reduce,
        overlap_param_gather=options.overlap_param_gather,
        align_param_gather=aligned,
        use_distributed_optimizer=options.use_distributed_optimizer,
        num_distributed_optimizer_instances=options.num_distributed_optimizer_instances,
        bucket_size=options.ddp_bucket_size,
        average_in_collective=options.average_in_collective,
        pad_buckets_for_high_nccl_busbw=options.pad_buckets_for_high_nccl_busbw,
        # health.py does this. It also checks the loss, names the layers, and lets a run leave the update out.
        check_for_nan_in_grad=False,
    )
    model_config = get_model_config(chunks[0])
    policy = [
        # As in Megatron: communication of later chunks overlaps with computing anyway.
        DistributedDataParallel(model_config, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    model_config.finalize_model_grads_func = finalize_model_grads
    if aligned:
        model_config.param_sync_func = [chunk.start_param_sync for chunk in policy]
    if options.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in policy]
        model_config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return policy


def optimizer_settings(config: Config) -> OptimizerConfig:
    """Return Megatron's configuration of the optimizer: AdamW with mixed precision and sharding."""
    options, is_fp32 = config.optimizer, config.training.precision == "fp32"
    return OptimizerConfig(
        optimizer="adam",
        lr=options.lr,
        min_lr=options.min_lr,
        weight_decay=options.weight_decay,
        adam_beta1=options.adam_beta1,
        adam_beta2=options.adam_beta2,
        adam_eps=options.adam_eps,
        clip_grad=options.clip_grad,
        bf16=not is_fp32,
        params_dtype=torch.float32 if is_fp32 else torch.bfloat16,
        fp8_recipe=config.training.fp8_recipe if config.training.precision == "fp8" else None,
        use_distributed_optimizer=options.use_distributed_optimizer,
        overlap_param_gather=options.overlap_param_gather,
        optimizer_cpu_offload=options.optimizer_cpu_offload,
        optimizer_offload_fraction=options.optimizer_offload_fraction,
        overlap_cpu_optimizer_d2h_h2d=options.overlap_cpu_optimizer_d2h_h2d,
        use_precision_aware_optimizer=options.use_precision_aware_optimizer,
        # Megatron-Core 0.19.2 saves the remainders of master weights as if they were the weights.
        store_param_remainders=False,
        **{name: _STATE_DTYPES[getattr(options, name)] for name in checks.STATE_DTYPES},
    )


def build_optimizer(config: Config, policy: list[DistributedDataParallel]) -> MegatronOptimizer:
    """Build Megatron's optimizer of :func:`optimizer_settings` for the policy. Collective over all ranks."""
    optimizer = get_megatron_optimizer(optimizer_settings(config), policy, use_gloo_process_groups=False)
    get_model_config(policy[0]).grad_scale_func = optimizer.scale_loss
    return optimizer


def build_scheduler(config: Config, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Build the schedule, in steps: linear warm-up, then the decay that ``optimizer.lr_decay_style`` names."""
    options = config.optimizer
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=options.lr,
        min_lr=options.min_lr,
        lr_warmup_steps=options.lr_warmup_iters,
        # A trial run may end within the warm-up.
        lr_decay_steps=max(config.training.train_iters, options.lr_warmup_iters + 1),
        lr_decay_style=options.lr_decay_style,
        start_wd=options.weight_decay,
        end_wd=options.weight_decay,
        wd_incr_steps=config.training.train_iters,
        wd_incr_style="constant",
    )
