"""How Megatron lays gradients out, and which part of the optimizer's state a rank keeps."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_cca.config import Config
from megatron_cca.lab.planner.parameters import Parameter, rank_parameters

# Megatron's, in numbers: parameters begin at multiples of the first, buckets end at multiples of the second and of
# the ranks that share them (megatron/core/optimizer/param_layout.py); the third is for wide NCCL transfers.
_ALIGNMENT, _BUCKET_MULTIPLE, _BUS_MULTIPLE = 64, 128, 2**16
# Numbers in a bucket, at least, and for every rank (megatron/core/distributed/distributed_data_parallel.py).
_BUCKET, _BUCKET_PER_RANK = 40_000_000, 1_000_000


@dataclass(frozen=True)
class Bucket:
    """A part of a gradient buffer that is reduced at once.

    Attributes:
        start, end: in numbers within the buffer, padding included.
        pieces: where its parameters lie.
    """

    start: int
    end: int
    pieces: tuple[tuple[int, int], ...]


def gradient_numbers(config: Config, pipeline_rank: int, sharing_ranks: int) -> int:
    """Numbers in the gradient buffers of a rank, with their padding.

    Args:
        config: of the run.
        pipeline_rank: which stage.
        sharing_ranks: data-parallel times context-parallel ranks.
    """
    chunks = _chunks_of_buckets(config, pipeline_rank, sharing_ranks)
    return sum(buckets[-1].end for buckets in chunks if buckets)


def optimizer_numbers(config: Config, pipeline_rank: int, sharing_ranks: int, rank: int) -> int:
    """Numbers whose state the optimizer of a rank keeps: all that are trained, or a distributed optimizer's share.

    Args:
        config, pipeline_rank, sharing_ranks: as of :func:`gradient_numbers`.
        rank: of ``sharing_ranks``.
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
    """Megatron splits only what would be reduced on the critical path: the first chunk of the first stage."""
    optimizer = config.optimizer
    if not optimizer.overlap_grad_reduce or pipeline_rank > 0 or chunk > 0:
        return None
    replicas = sharing_ranks // config.parallel.context_parallel_size
    return optimizer.ddp_bucket_size or max(_BUCKET, _BUCKET_PER_RANK * replicas)


def _buckets(config: Config, parameters: list[Parameter], sharing_ranks: int, bucket_size: int | None) -> list[Bucket]:
    """From the last parameter to the first, as backward reaches them."""
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
