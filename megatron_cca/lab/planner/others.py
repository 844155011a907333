"""Why the obvious layouts are not the best one: a line each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_cca.config import Config
from megatron_cca.errors import UserError
from megatron_cca.lab.planner.candidates import Layout, laid_out
from megatron_cca.lab.planner.trials import Candidate, Wishes, candidate_of, misfit


@dataclass(frozen=True)
class Other:
    """A layout that somebody would think of.

    Attributes:
        name: in words.
        verdict: what is wrong with it.
    """

    name: str
    verdict: str


def obvious_others(best: Candidate, wishes: Wishes) -> list[Other]:
    """The usual layouts, and the best one with a single thing changed.

    Args:
        best: the plan's first.
        wishes: that it was searched with.
    """
    return [
        Other(name, _verdict(config, best, wishes))
        for name, config in [*_usual(best.config, wishes), *_neighbours(best.config)]
        if config != best.config
    ]


def _usual(config: Config, wishes: Wishes) -> Iterator[tuple[str, Config]]:
    node = min(wishes.cluster.gpus_per_node, wishes.cluster.num_gpus)
    yield "data parallelism alone", laid_out(config, Layout())
    yield f"TP {node} alone", laid_out(config, Layout(tensor=node))
    yield f"PP {node} alone", laid_out(config, Layout(pipeline=node))
    if wishes.cluster.num_gpus > node:
        yield f"TP {node} x PP 2", laid_out(config, Layout(tensor=node, pipeline=2))


def _neighbours(config: Config) -> Iterator[tuple[str, Config]]:
    """The best one, but for one thing."""
    training, optimizer, reference = config.training, config.optimizer, config.reference
    yield "the best, no recomputation", replace(config, training=replace(training, recompute_granularity=None))
    full = replace(training, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    yield "the best, full recomputation", replace(config, training=full)
    doubled = replace(training, micro_batch_size=2 * training.micro_batch_size)
    yield f"the best, micro batch {doubled.micro_batch_size}", replace(config, training=doubled)
    if config.lora.dim is None:
        whole = replace(
            optimizer, use_distributed_optimizer=False, overlap_grad_reduce=False, overlap_param_gather=False
        )
        yield "the best, without the distributed optimizer", replace(config, optimizer=whole)
    if config.objective.needs_reference:
        plain = replace(reference, strategy="resident", cache=None, fp8_param=False)
        yield "the best, reference resident", replace(config, reference=plain)
        yield "the best, reference offloaded", replace(config, reference=replace(plain, strategy="offload"))
    if config.parallel.virtual_pipeline_model_parallel_size is not None:
        single = replace(config.parallel, virtual_pipeline_model_parallel_size=None)
        yield "the best, not interleaved", replace(config, parallel=single)


def _verdict(config: Config, best: Candidate, wishes: Wishes) -> str:
    try:
        candidate = candidate_of(config, wishes)
    except UserError as error:
        return f"refused: {error}"
    problem = misfit(candidate, wishes)
    if problem is not None:
        return problem
    slower = candidate.step.total / best.step.total - 1
    return f"{slower:.0%} slower" if slower >= 0.005 else "as fast"
