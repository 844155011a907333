"""Candidates with their costs: what they take, and whether that fits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from megatron_cca.config import Config
from megatron_cca.errors import UserError
from megatron_cca.lab.planner.calibration import DEFAULT, Calibration
from megatron_cca.lab.planner.candidates import DEFAULT_VARIABLES, check_candidate, layouts, options
from megatron_cca.lab.planner.hardware import Cluster
from megatron_cca.lab.planner.memory import GIB, MemoryEstimate, predict_memory
from megatron_cca.lab.planner.step_time import StepTime
from megatron_cca.lab.planner.throughput import predict_step
from megatron_cca.lab.planner.workload import ImageShape, Workload, image_workload

# Of a GPU's memory a plan may fill so much: the rest is for fragments and for what no formula knows.
MEMORY_SHARE = 0.92
# A smaller saving of memory is none.
_WORTHWHILE = 1.01


@dataclass(frozen=True)
class Wishes:
    """What to plan for.

    Attributes:
        cluster: the GPUs.
        images: the data.
        vary: of ``candidates.VARIABLES``, what may be changed beside the layout.
        calibration: of the GPU.
    """

    cluster: Cluster
    images: ImageShape
    vary: Sequence[str] = DEFAULT_VARIABLES
    calibration: Calibration = DEFAULT

    @property
    def memory_limit(self) -> float:
        """Bytes that a rank may hold."""
        return MEMORY_SHARE * self.cluster.gpu.memory_bytes


@dataclass(frozen=True)
class Candidate:
    """A configuration that training accepts, and what it would cost.

    Attributes:
        config: as it would be run.
        workload: its rows.
        step: its time.
        num_gpus: all.
    """

    config: Config
    workload: Workload
    step: StepTime
    num_gpus: int

    @cached_property
    def memory(self) -> MemoryEstimate:
        """Of the rank that holds most."""
        return predict_memory(self.config, self.num_gpus, self.workload)


def misfit(candidate: Candidate, wishes: Wishes) -> str | None:
    """Why it does not fit into memory, in words; None if it does."""
    needed, limit = candidate.memory.total, wishes.memory_limit
    return None if needed <= limit else f"does not fit: {needed / GIB:.1f} GiB, {limit / GIB:.1f} may be filled"


def candidate_of(config: Config, wishes: Wishes) -> Candidate:
    """The costs of a configuration.

    Raises:
        UserError: training's or the GPU's refusal.
    """
    cluster = wishes.cluster
    check_candidate(config, cluster.num_gpus)
    return _timed(config, wishes, image_workload(config, wishes.images))


def _timed(config: Config, wishes: Wishes, workload: Workload) -> Candidate:
    step = predict_step(config, wishes.cluster, workload, wishes.calibration)
    return Candidate(config, workload, step, wishes.cluster.num_gpus)


def candidates(config: Config, wishes: Wishes) -> Iterator[Candidate]:
    """All of them, in no order; whether they fit is not asked.

    Raises:
        UserError: rows too long for the model, on any layout.
    """
    problem, is_possible = None, False
    for layout in layouts(config, wishes.cluster, vary_micro_batch="micro_batch" in wishes.vary):
        workloads: dict[int, Workload] = {}
        for one in options(config, layout, wishes.cluster, wishes.vary):
            padded = one.data.pad_to_multiple_of
            try:
                workloads[padded] = workloads.get(padded) or image_workload(one, wishes.images)
            except UserError as error:
                problem = error
                continue
            is_possible = True
            yield _timed(one, wishes, workloads[padded])
    if problem is not None and not is_possible:
        raise problem


def fitting(found: Sequence[Candidate], wishes: Wishes, top: int) -> list[Candidate]:
    """The first ``top`` that training accepts, that fit into memory, and that have a point.

    One that is slower than another of the same layout, for recomputing, and saves no memory has none.
    """
    best: list[Candidate] = []
    for candidate in found:
        if len(best) == top:
            break
        fits = _is_accepted(candidate) and candidate.memory.total <= wishes.memory_limit
        if fits and not any(_makes_pointless(other, candidate) for other in best):
            best.append(candidate)
    return best


def _makes_pointless(other: Candidate, candidate: Candidate) -> bool:
    """Whether a faster candidate is the same but for recomputation, and needs hardly more memory."""
    differ = ("recompute_granularity", "recompute_modules", "recompute_method", "recompute_num_layers")
    training = replace(candidate.config.training, **{name: getattr(other.config.training, name) for name in differ})
    same = replace(candidate.config, training=training) == other.config
    return same and other.memory.total <= _WORTHWHILE * candidate.memory.total


def _is_accepted(candidate: Candidate) -> bool:
    try:
        check_candidate(candidate.config, candidate.num_gpus)
    except UserError:
        return False
    return True
