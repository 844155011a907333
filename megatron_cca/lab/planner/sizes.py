"""The sizes of a run on one rank: layers, rows, tokens, microbatches, gradients, optimizer state.

Gradients lie in buckets. A distributed optimizer keeps each rank's part of each bucket.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_cca.config import Config
from megatron_cca.lab.planner.parameters import (
    Parameter,
    architecture_of,
    embedding_parameters,
    head_parameters,
    layer_parameters,
    rank_parameters,
)
from megatron_cca.lab.planner.workload import Workload
from megatron_cca.models.architecture import Architecture, padded_output_size
from megatron_cca.parallel.tiles import own_part
from megatron_cca.training import head_support, rows_per_sample
from megatron_cca.training.checks import data_parallel_size

# Megatron's constants, in elements. Parameters begin at multiples of the first. Buckets end at multiples of the second
# and of the number of ranks that share them (megatron/core/optimizer/param_layout.py). The third is for wide NCCL
# transfers.
_ALIGNMENT, _BUCKET_MULTIPLE, _BUS_MULTIPLE = 64, 128, 2**16
# The least number of elements in a bucket, and the number for each rank
# (megatron/core/distributed/distributed_data_parallel.py).
_BUCKET, _BUCKET_PER_RANK = 40_000_000, 1_000_000


@dataclass(frozen=True)
class Sizes:
    """The sizes of a rank of the last pipeline stage.

    This stage has most to do: its layers and the LM head.

    Attributes:
        architecture: the architecture of the model.
        tensor, pipeline, context, data: the parallel sizes.
        chunks: model chunks on a rank.
        layers: layers on a rank.
        rows: rows in a microbatch.
        microbatches: microbatches of a rank in a step.
        tokens: tokens of a microbatch on one context-parallel rank.
        image_tokens: image tokens that pass through the head: those of all rows, or of half of them if rows are mixed.
        seq_length: S, the positions of a row.
        layer_weights, embedding_weights, head_weights: elements of one layer, of the embedding, and of the head with
            its norm, on one rank.
        words: ids whose logits are computed, on the tensor-parallel rank that has most.
    """

    architecture: Architecture
    tensor: int
    pipeline: int
    context: int
    data: int
    chunks: int
    layers: int
    rows: int
    microbatches: int
    tokens: float
    image_tokens: float
    seq_length: int
    layer_weights: int
    embedding_weights: int
    head_weights: int
    words: float

    @property
    def trained_weights(self) -> int:
        """Number of trained elements on the rank if all weights are trained.

        These are the layers, the head, and the embedding if there is a single stage.
        """
        embedding = self.embedding_weights if self.pipeline == 1 else 0
        return self.layers * self.layer_weights + embedding + self.head_weights


def sizes_of(config: Config, world_size: int, workload: Workload) -> Sizes:
    """Return the sizes of a run on ``world_size`` processes.

    ``training.checks.check_new_run`` must accept the configuration.
    """
    architecture, parallel, training = architecture_of(config.model), config.parallel, config.training
    tensor, pipeline, context = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    data = data_parallel_size(config, world_size)
    rows = training.micro_batch_size * rows_per_sample(config)
    head_rows = padded_output_size(architecture, config.model, tensor)
    return Sizes(
        architecture=architecture,
        tensor=tensor,
        pipeline=pipeline,
        context=context,
        data=data,
        chunks=parallel.virtual_pipeline_model_parallel_size or 1,
        layers=architecture.num_layers // pipeline,
        rows=rows,
        microbatches=training.global_batch_size // (training.micro_batch_size * data),
        tokens=rows * workload.seq_length / context,
        image_tokens=training.micro_batch_size * config.objective.logps_per_sample * workload.image_tokens / context,
        seq_length=workload.seq_length,
        layer_weights=_numel(layer_parameters(config)),
        embedding_weights=_numel(embedding_parameters(config)),
        head_weights=_numel(head_parameters(config)),
        words=_words(config, architecture, head_rows // tensor),
    )


def _numel(parameters: list[Parameter]) -> int:
    return sum(one.numel for one in parameters)


def _words(config: Config, architecture: Architecture, rows: int) -> float:
    tensor, support = config.parallel.tensor_model_parallel_size, head_support(config, architecture.vocabulary)
    if len(support) == architecture.vocabulary.output_size:
        # The padding leaves the last rank a little less.
        return len(support) / tensor
    return max(len(own_part(support, rank * rows, rows)) for rank in range(tensor))


@dataclass(frozen=True)
class Bucket:
    """A part of a gradient buffer that one collective reduces.

    Attributes:
        start, end: positions in elements within the buffer, padding included.
        pieces: start and end of each of its parameters.
    """

    start: int
    end: int
    pieces: tuple[tuple[int, int], ...]


def gradient_numbers(config: Config, pipeline_rank: int, sharing_ranks: int) -> int:
    """Return the number of elements in a rank's gradient buffers, padding included.

    Args:
        config: configuration of the run.
        pipeline_rank: the pipeline stage.
        sharing_ranks: data-parallel size times context-parallel size.
    """
    chunks = _chunks_of_buckets(config, pipeline_rank, sharing_ranks)
    return sum(buckets[-1].end for buckets in chunks if buckets)


def optimizer_numbers(config: Config, pipeline_rank: int, sharing_ranks: int, rank: int) -> int:
    """Return the number of elements whose state the optimizer of a rank keeps.

    These are all trained elements, or the rank's share with a distributed optimizer.

    Args:
        config, pipeline_rank, sharing_ranks: as in :func:`gradient_numbers`.
        rank: the rank among ``sharing_ranks``.
    """
    chunks = _chunks_of_buckets(config, pipeline_rank, sharing_ranks)
    shards = sharing_ranks // config.optimizer.num_distributed_optimizer_instances
    if not config.optimizer.use_distributed_optimizer:
        shards, rank = 1, 0
    return sum(_share(bucket, shards, rank % shards) for buckets in chunks for bucket in buckets)


def _share(bucket: Bucket, shards: int, rank: int) -> int:
    size = (bucket.end - bucket.start) // shards
    start = bucket.start + rank * size
    return sum(max(0, min(end, start + size) - max(begin, start)) for begin, end in bucket.pieces)


def _chunks_of_buckets(config: Config, pipeline_rank: int, sharing_ranks: int) -> list[list[Bucket]]:
    chunks = rank_parameters(config, pipeline_rank)
    return [
        _buckets(config, trained, sharing_ranks, _bucket_size(config, sharing_ranks, pipeline_rank, index))
        for index, trained in enumerate([one for one in chunk if one.is_trained] for chunk in chunks)
    ]


def _bucket_size(config: Config, sharing_ranks: int, pipeline_rank: int, chunk: int) -> int | None:
    """Return the bucket size in elements; None means one bucket for all.

    Megatron splits only the first chunk of the first stage. Its reduction would lie on the critical path.
    """
    optimizer = config.optimizer
    if not optimizer.overlap_grad_reduce or pipeline_rank > 0 or chunk > 0:
        return None
    replicas = sharing_ranks // config.parallel.context_parallel_size
    return optimizer.ddp_bucket_size or max(_BUCKET, _BUCKET_PER_RANK * replicas)


def _buckets(config: Config, parameters: list[Parameter], sharing_ranks: int, bucket_size: int | None) -> list[Bucket]:
    """Return the buckets of a model chunk.

    They go from the last parameter to the first, in the order of backward.
    """
    is_sharded = config.optimizer.use_distributed_optimizer
    multiple = math.lcm(
        sharing_ranks // config.optimizer.num_distributed_optimizer_instances,
        _BUCKET_MULTIPLE,
        _BUS_MULTIPLE if config.optimizer.pad_buckets_for_high_nccl_busbw else 1,
    )
    buckets, pieces, start, place = [], [], 0, 0
    for index, parameter in enumerate(reversed(parameters)):
        place = _rounded_up(place, _ALIGNMENT) if is_sharded else place
        pieces.append((place, place + parameter.numel))
        place += parameter.numel
        is_full = bucket_size is not None and place - start >= bucket_size
        if is_full or index == len(parameters) - 1:
            place = _rounded_up(place, multiple) if is_sharded else place
            buckets.append(Bucket(start, place, tuple(pieces)))
            pieces, start = [], place
    return buckets


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
