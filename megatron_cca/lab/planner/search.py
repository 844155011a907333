"""The layouts that fit, fastest first."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_cca.config import Config
from megatron_cca.lab.planner.candidates import Layout, check_fp8, laid_out
from megatron_cca.lab.planner.too_small import check_cluster, refuse_too_small
from megatron_cca.lab.planner.trials import Candidate, Wishes, candidates, fitting
from megatron_cca.models import explicit
from megatron_cca.training.reference_settings import reference_settings


@dataclass(frozen=True)
class Plan:
    """What a search found.

    Attributes:
        wishes: that it started from.
        best: candidates that fit, fastest first.
        cached: the fastest that fits if the reference's log-probabilities were computed beforehand; None where that is
            no choice.
        considered: how many candidates there were.
    """

    wishes: Wishes
    best: list[Candidate]
    cached: Candidate | None
    considered: int


def search(config: Config, wishes: Wishes, top: int) -> Plan:
    """Try every candidate.

    Args:
        config: everything but the layout and what may vary; must be acceptable on some layout.
        wishes: cluster, data, what may vary.
        top: how many to return.

    Raises:
        UserError: a number of GPUs or a model that no layout suits, a precision that the GPU lacks, too little memory.
    """
    config = explicit(config)
    _check_precisions(config, wishes)
    check_cluster(config, wishes)
    offers_cache = _offers_cache(config, wishes)
    vary = (*wishes.vary, "cached") if offers_cache else wishes.vary
    everything = sorted(candidates(config, replace(wishes, vary=vary)), key=_rank)
    cached = [one for one in everything if one.config.reference.strategy == "cached"] if offers_cache else []
    found = [one for one in everything if one.config.reference.strategy != "cached"] if offers_cache else everything
    best = fitting(found, wishes, top)
    if not best:
        refuse_too_small(config, wishes, found)
    return Plan(wishes, best, next(iter(fitting(cached, wishes, 1)), None), len(found))


def _check_precisions(config: Config, wishes: Wishes) -> None:
    gpu = wishes.cluster.gpu
    gpu.peak_flops(config.training.precision)
    if config.objective.needs_reference:
        gpu.peak_flops(reference_settings(config).precision, "reference.precision")
    check_fp8(laid_out(config, Layout()))


def _rank(candidate: Candidate) -> tuple:
    """Fastest first; of equally fast ones those with less to go wrong."""
    parallel = candidate.config.parallel
    sizes = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
        parallel.virtual_pipeline_model_parallel_size or 1,
    )
    return (candidate.step.total, *sizes)


def _offers_cache(config: Config, wishes: Wishes) -> bool:
    """Whether to say what a cache of the reference's log-probabilities would gain, without planning with one."""
    uses_pairs = config.objective.needs_reference
    return uses_pairs and "reference" in wishes.vary and "cached" not in wishes.vary and not _has_cache(config)


def _has_cache(config: Config) -> bool:
    return config.reference.strategy == "cached"
