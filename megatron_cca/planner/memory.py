"""Bytes that a rank of a run holds, computed from sizes alone."""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron_cca.config import Config
from megatron_cca.planner.workload import Workload


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank at the moment when it holds most; the parts add up to ``total``.

    Attributes:
        weights: the policy's parameters, as they are computed with.
        reference: the frozen model, as its strategy keeps it on the device.
        gradients: Megatron's gradient buffer.
        optimizer: master weights and Adam's moments of this rank's share.
        activations: kept for backward by all microbatches in flight, and one layer's working memory.
        head: hidden states, statistics and tiles of the log-probabilities.
        communication: buffers of collectives and of sends between stages.
        overhead: the CUDA context, libraries and what the allocator cannot use; 0 on a CPU.
    """

    weights: int
    reference: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    communication: int
    overhead: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))


def predict_memory(
    config: Config, world_size: int, workload: Workload, *, on_gpu: bool = True, pipeline_rank: int | None = None
) -> MemoryEstimate:
    """What a rank of the run holds at its peak.

    Args:
        config: of the run; must have passed ``training.checks.check_new_run``.
        world_size: its processes.
        workload: the rows of a microbatch.
        on_gpu: whether to count what only a GPU's run has (fused kernels, wide tiles, the CUDA context), or a CPU's.
        pipeline_rank: which; None is the one that holds most.
    """
    raise NotImplementedError
