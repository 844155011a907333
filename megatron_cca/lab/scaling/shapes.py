"""What follows from a layout's sizes alone."""

from __future__ import annotations

from megatron_cca.config import Config
from megatron_cca.training.checks import data_parallel_size


def ideal_bubble(config: Config, num_gpus: int) -> float:
    """(pp - 1) / (m vpp + pp - 1): of a pipeline whose stages all take equally long."""
    parallel, training = config.parallel, config.training
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    microbatches = training.global_batch_size // (training.micro_batch_size * data_parallel_size(config, num_gpus))
    return (stages - 1) / (microbatches * chunks + stages - 1)
