"""Join the job and split it into Megatron's groups."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_cca import platform
from megatron_cca.config import Config


def initialize_distributed(config: Config) -> None:
    """Join the job and split it into Megatron's groups. A second call with the same layout is harmless."""
    parallel = config.parallel
    if not dist.is_initialized():
        timeout = timedelta(minutes=config.training.distributed_timeout_minutes)
        dist.init_process_group(timeout=timeout, **platform.process_group_options())
    if not parallel_state.model_parallel_is_initialized():
        chunks = parallel.virtual_pipeline_model_parallel_size or 1
        parallel_state.initialize_model_parallel(
            parallel.tensor_model_parallel_size,
            parallel.pipeline_model_parallel_size,
            chunks if chunks > 1 else None,
            context_parallel_size=parallel.context_parallel_size,
            num_distributed_optimizer_instances=config.optimizer.num_distributed_optimizer_instances,
            create_gloo_process_groups=False,
            distributed_timeout_minutes=config.training.distributed_timeout_minutes,
        )
    # CUDA graphs can replay random numbers only from Transformer Engine's tracker.
    captures = config.kernels.cuda_graph_impl != "none"
    model_parallel_cuda_manual_seed(config.training.seed, te_rng_tracker=captures, force_reset_rng=captures)
