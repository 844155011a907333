"""The search for the fastest layouts that fit, and the reasons against other layouts.

If no layout fits, it says why and what would fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

from megatron_cca.config import Config
from megatron_cca.errors import UserError
from megatron_cca.lab.planner.candidates import (
    Candidate,
    Layout,
    SearchInputs,
    candidate_of,
    candidates,
    check_candidate,
    check_fp8,
    fitting,
    laid_out,
    layouts,
    misfit,
)
from megatron_cca.lab.planner.hardware import GPUS, Cluster
from megatron_cca.lab.planner.memory import GIB
from megatron_cca.models import explicit
from megatron_cca.training import reference_settings

_MOST_NODES = 64


@dataclass(frozen=True)
class Plan:
    """The result of a search.

    Attributes:
        inputs: the input of the search.
        best: candidates that fit, fastest first.
        cached: the fastest that fits if the reference's log-probabilities are cached beforehand; None where a cache is
            no option.
        considered: number of candidates.
    """

    inputs: SearchInputs
    best: list[Candidate]
    cached: Candidate | None
    considered: int


def search(config: Config, inputs: SearchInputs, top: int) -> Plan:
    """Search all candidates for the fastest ones that fit.

    Args:
        config: the run; the layout and whatever ``inputs.vary`` names may change; some layout must be acceptable.
        inputs: the cluster, the data, and what may vary.
        top: number of layouts to return.

    Raises:
        UserError: a number of GPUs or a model for which no layout exists, a precision that the GPU lacks, or too little
            memory.
    """
    config = explicit(config)
    _check_precisions(config, inputs)
    check_cluster(config, inputs)
    offers_cache = _offers_cache(config, inputs)
    vary = (*inputs.vary, "cached") if offers_cache else inputs.vary
    everything = sorted(candidates(config, replace(inputs, vary=vary)), key=_rank)
    cached = [one for one in everything if one.config.reference.strategy == "cached"] if offers_cache else []
    found = [one for one in everything if one.config.reference.strategy != "cached"] if offers_cache else everything
    best = fitting(found, inputs, top)
    if not best:
        refuse_too_small(config, inputs, found)
    return Plan(inputs, best, next(iter(fitting(cached, inputs, 1)), None), len(found))


def _check_precisions(config: Config, inputs: SearchInputs) -> None:
    gpu = inputs.cluster.gpu
    gpu.peak_flops(config.training.precision)
    if config.objective.needs_reference:
        gpu.peak_flops(reference_settings(config).precision, "reference.precision")
    check_fp8(laid_out(config, Layout()))


def _rank(candidate: Candidate) -> tuple:
    """Return a candidate's sort key.

    The fastest comes first. Of equally fast ones, the one with the smaller parallel sizes comes first.
    """
    parallel = candidate.config.parallel
    sizes = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
        parallel.virtual_pipeline_model_parallel_size or 1,
    )
    return (candidate.step.total, *sizes)


def _offers_cache(config: Config, inputs: SearchInputs) -> bool:
    """Check whether to report the gain of a cache of the reference's log-probabilities.

    The plan itself does not use one then.
    """
    uses_pairs = config.objective.needs_reference
    return uses_pairs and "reference" in inputs.vary and "cached" not in inputs.vary and not _has_cache(config)


def _has_cache(config: Config) -> bool:
    return config.reference.strategy == "cached"


def check_cluster(config: Config, inputs: SearchInputs) -> None:
    """Refuse a number of GPUs for which no layout exists.

    Raises:
        UserError: names the number and the nearest possible ones, or what training refuses on any of them.
    """
    cluster = inputs.cluster
    node, gpus = cluster.gpus_per_node, cluster.num_gpus
    if gpus > node and gpus % node:
        lower = gpus // node * node
        raise UserError(
            f"--gpus: {gpus} is no whole number of nodes of {node}; the nearest are {lower} and {lower + node}, "
            "or give another --nodes-of"
        )
    if _has_layout(config, inputs, gpus):
        return
    advice = [f"{n} GPUs" for n in _nearest(config, inputs)]
    batch = _nearest_batch(config, inputs)
    advice += [f"training.global_batch_size {batch}"] if batch else []
    if not advice:
        # Something else than the layout is wrong.
        check_candidate(laid_out(config, Layout()), 1)
    raise UserError(
        f"--gpus: {gpus} cannot be divided into tensor, pipeline, context and data parallelism for this model and "
        f"training.global_batch_size {config.training.global_batch_size}; possible: {' or '.join(advice)}"
    )


def _has_layout(config: Config, inputs: SearchInputs, gpus: int) -> bool:
    cluster = replace(inputs.cluster, num_gpus=gpus)
    return any(True for _ in layouts(config, cluster, vary_micro_batch="micro_batch" in inputs.vary))


def _nearest(config: Config, inputs: SearchInputs) -> list[int]:
    """Return the largest possible number of GPUs below, and the smallest above."""
    gpus, node = inputs.cluster.num_gpus, inputs.cluster.gpus_per_node
    step = node if gpus > node else 1
    below = next((n for n in range(gpus - step, 0, -step) if _has_layout(config, inputs, n)), None)
    above = range(gpus + step, 2 * gpus + 1, step) if gpus > node else [*range(gpus + 1, node + 1), 2 * node]
    return [n for n in (below, next((n for n in above if _has_layout(config, inputs, n)), None)) if n]


def _nearest_batch(config: Config, inputs: SearchInputs) -> int | None:
    """Return the next larger global batch size for which the GPUs have a layout."""
    gpus, batch = inputs.cluster.num_gpus, config.training.global_batch_size
    for size in range(batch + 1, batch + gpus + 1):
        if _has_layout(replace(config, training=replace(config.training, global_batch_size=size)), inputs, gpus):
            return size
    return None


def refuse_too_small(config: Config, inputs: SearchInputs, found: Sequence[Candidate]) -> NoReturn:
    """Refuse a cluster with too little memory; say how much is missing at least, and what would fit.

    Raises:
        UserError: always.
    """
    least = min((one.memory.total for one in found), default=0)
    cluster = inputs.cluster
    where = f"{cluster.num_gpus} x {cluster.gpu.name}"
    problem = f"--gpus: {where} are too little for this model: the best layout needs {least / GIB:.1f} GiB on a GPU"
    raise UserError(f"{problem}, of which {inputs.memory_limit / GIB:.1f} may be filled; {_advice(config, inputs)}")


def _advice(config: Config, inputs: SearchInputs) -> str:
    would_do = [text for text in (_more_gpus(config, inputs), _other_gpus(config, inputs)) if text]
    if config.lora.dim is None and _fits(replace(config, lora=replace(config.lora, dim=16)), inputs):
        would_do.append("lora.dim=16 on these")
    return f"would do: {', or '.join(would_do)}" if would_do else "nothing known here would do"


def _more_gpus(config: Config, inputs: SearchInputs) -> str | None:
    cluster = inputs.cluster
    sizes = [n for n in range(cluster.num_gpus + 1, cluster.gpus_per_node + 1) if cluster.gpus_per_node % n == 0]
    nodes = max(1, cluster.num_gpus // cluster.gpus_per_node)
    while nodes < _MOST_NODES:
        nodes *= 2
        sizes.append(nodes * cluster.gpus_per_node)
    for size in sizes:
        if _fits(config, replace(inputs, cluster=replace(cluster, num_gpus=size))):
            return f"{size} of them"
    return None


def _other_gpus(config: Config, inputs: SearchInputs) -> str | None:
    cluster = inputs.cluster
    larger = sorted(
        (gpu for gpu in GPUS.values() if gpu.memory_bytes > cluster.gpu.memory_bytes), key=lambda gpu: gpu.memory_bytes
    )
    for gpu in larger:
        # Take its data sheet. A calibration is valid for one GPU.
        elsewhere = SearchInputs(Cluster(gpu, cluster.num_gpus, cluster.gpus_per_node), inputs.images, inputs.vary)
        if config.training.precision in gpu.flops and _fits(config, elsewhere):
            return f"{cluster.num_gpus} x {gpu.name}"
    return None


def _fits(config: Config, inputs: SearchInputs) -> bool:
    try:
        found = sorted(candidates(config, inputs), key=lambda one: -one.step.recompute)
    except UserError:
        return False
    return bool(fitting(found, inputs, 1))


@dataclass(frozen=True)
class Alternative:
    """A usual layout that is not the best.

    Attributes:
        name: its description.
        verdict: what is wrong with it.
    """

    name: str
    verdict: str


def usual_alternatives(best: Candidate, inputs: SearchInputs) -> list[Alternative]:
    """Return the usual layouts, and the best layout with one change each, with their verdicts.

    Args:
        best: the first candidate of the plan.
        inputs: the input of the search.
    """
    return [
        Alternative(name, _verdict(config, best, inputs))
        for name, config in [*_usual(best.config, inputs), *_neighbours(best.config)]
        if config != best.config
    ]


def _usual(config: Config, inputs: SearchInputs) -> Iterator[tuple[str, Config]]:
    node = min(inputs.cluster.gpus_per_node, inputs.cluster.num_gpus)
    if laid_out(config, Layout(micro_batch=config.training.micro_batch_size)) != config:
        yield "data parallelism alone", laid_out(config, Layout())
    yield f"TP {node} alone", laid_out(config, Layout(tensor=node))
    yield f"PP {node} alone", laid_out(config, Layout(pipeline=node))
    if inputs.cluster.num_gpus > node:
        yield f"TP {node} x PP 2", laid_out(config, Layout(tensor=node, pipeline=2))


def _neighbours(config: Config) -> Iterator[tuple[str, Config]]:
    """Yield the best configuration with one change each."""
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


def _verdict(config: Config, best: Candidate, inputs: SearchInputs) -> str:
    try:
        candidate = candidate_of(config, inputs)
    except UserError as error:
        return f"refused: {error}"
    problem = misfit(candidate, inputs)
    if problem is not None:
        return problem
    slower = candidate.step.total / best.step.total - 1
    return f"{slower:.0%} slower" if slower >= 0.005 else "as fast"
