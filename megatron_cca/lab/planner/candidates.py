"""All ways to lay out a run, as real configurations, each with its memory, its time, and whether it fits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from megatron_cca.config import Config, OptimizerConfig
from megatron_cca.errors import UserError
from megatron_cca.lab.planner.hardware import DEFAULT, Calibration, Cluster
from megatron_cca.lab.planner.memory import GIB, MemoryEstimate, predict_memory
from megatron_cca.lab.planner.throughput import StepTime, predict_step
from megatron_cca.lab.planner.workload import ImageShape, Workload, image_workload
from megatron_cca.models import resolve_architecture
from megatron_cca.training import same_weights, settings_by_key
from megatron_cca.training.checks import check_new_run
from megatron_cca.training.kernel_checks import check_fp8_sizes

# What a search may change beside the layout. The last two need a request: ``precision`` changes what is computed, and
# ``cached`` needs a pass over the data beforehand.
VARIABLES = ("micro_batch", "recompute", "optimizer", "reference", "precision", "cached")
DEFAULT_VARIABLES = ("micro_batch", "recompute", "optimizer", "reference")

# The place of a cache that does not exist yet.
CACHE_PLACE = "caches/reference"

_MAX_CONTEXT = 8
_MAX_MICRO_BATCH = 16
_RECOMPUTE: tuple[dict, ...] = (
    {"recompute_granularity": None},
    {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
    {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
)
# The share of a GPU's memory that a plan may fill. The rest is for fragmentation and for what no formula covers.
MEMORY_SHARE = 0.92
# A saving of memory counts from this ratio on.
_WORTHWHILE = 1.01


@dataclass(frozen=True)
class Layout:
    """Parallel sizes, and the samples of a microbatch.

    Attributes:
        tensor, pipeline, virtual, context: the parallel sizes; virtual 1 means no interleaving.
        micro_batch: samples of a microbatch.
    """

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    context: int = 1
    micro_batch: int = 1


def laid_out(config: Config, layout: Layout) -> Config:
    """Return the configuration on a layout.

    It also sets the switches that follow from the layout, such as sequence parallelism with TP.
    """
    parallel = replace(
        config.parallel,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual if layout.virtual > 1 else None,
        context_parallel_size=layout.context,
        sequence_parallel=layout.tensor > 1,
        tp_comm_overlap=config.parallel.tp_comm_overlap and layout.tensor > 1,
        overlap_p2p_comm=config.parallel.overlap_p2p_comm if layout.virtual > 1 else None,
        microbatch_group_size_per_vp_stage=None,
    )
    return replace(config, parallel=parallel, training=replace(config.training, micro_batch_size=layout.micro_batch))


def check_candidate(config: Config, num_gpus: int) -> None:
    """Refuse what training would refuse, except for files and host memory.

    These belong to another machine.

    Raises:
        UserError: the message is that of training.
    """
    check_new_run(without_files(config), num_gpus)
    check_fp8(config)


def check_fp8(config: Config) -> None:
    """Refuse sizes that FP8 products cannot take.

    Raises:
        UserError: the message is that of training.
    """
    for key, one in settings_by_key(config).items():
        check_fp8_sizes(config, one, key)


def without_files(config: Config) -> Config:
    """Return the same run with random weights and without files.

    Its sizes stay the same.
    """
    reference = replace(config.reference, checkpoint=None)
    if reference.strategy == "offload":
        reference = replace(reference, strategy="resident")
    return replace(
        config,
        training=replace(config.training, pretrained_checkpoint=None),
        reference=reference,
        logging=replace(config.logging, sample_interval=0),
    )


def layouts(config: Config, cluster: Cluster, *, vary_micro_batch: bool) -> Iterator[Layout]:
    """Yield all layouts that training accepts on the cluster.

    Tensor parallelism stays within a node.
    """
    architecture, config = resolve_architecture(config.model), without_files(config)
    micro_batches = _divisors(config.training.global_batch_size, _MAX_MICRO_BATCH)
    if not vary_micro_batch:
        micro_batches = [config.training.micro_batch_size]
    for tensor in _divisors(cluster.gpus_per_node, cluster.num_gpus):
        for pipeline in _divisors(architecture.num_layers, cluster.num_gpus // tensor):
            for virtual in _divisors(architecture.num_layers // pipeline, math.inf if pipeline > 1 else 1):
                for context in _powers_of_two(min(_MAX_CONTEXT, cluster.num_gpus // (tensor * pipeline))):
                    for micro_batch in micro_batches:
                        layout = Layout(tensor, pipeline, virtual, context, micro_batch)
                        if _is_accepted(config, layout, cluster.num_gpus):
                            yield layout


def _is_accepted(config: Config, layout: Layout, num_gpus: int) -> bool:
    model_parallel = layout.tensor * layout.pipeline * layout.context
    if num_gpus % model_parallel or config.training.global_batch_size % (num_gpus // model_parallel):
        return False
    try:
        check_new_run(laid_out(config, layout), num_gpus)
    except UserError:
        return False
    return True


def options(config: Config, layout: Layout, cluster: Cluster, vary: Sequence[str]) -> Iterator[Config]:
    """Yield all settings of memory and speed on a layout.

    What ``vary`` does not name stays the same.
    """
    laid = laid_out(config, layout)
    optimizer = _optimizer(laid, cluster.num_gpus // (layout.tensor * layout.pipeline), vary)
    for precision in _precisions(laid, cluster, vary):
        settings = replace(laid.training, precision=precision)
        if precision == "fp8" != config.training.precision:
            # FP8 products need rows of this multiple on every rank.
            multiple = math.lcm(laid.data.pad_to_multiple_of, 128 * layout.tensor * layout.context)
            laid = replace(laid, data=replace(laid.data, pad_to_multiple_of=multiple))
        references = list(_references(replace(laid, training=settings), vary))
        for recompute in _RECOMPUTE if "recompute" in vary else ({},):
            training = replace(settings, **recompute)
            for reference in references:
                yield replace(laid, training=training, optimizer=optimizer, reference=reference)


def _precisions(config: Config, cluster: Cluster, vary: Sequence[str]) -> list[str]:
    own = config.training.precision
    others = [name for name in ("bf16", "fp8") if name in cluster.gpu.flops and name != own]
    return [own, *others] if "precision" in vary else [own]


def _optimizer(config: Config, shards: int, vary: Sequence[str]) -> OptimizerConfig:
    """Return the optimizer's options with a distributed state and with overlap.

    They are never slower and never need more memory.
    """
    # With LoRA's few adapters this makes no difference.
    if "optimizer" not in vary or config.lora.dim is not None:
        return config.optimizer
    overlaps = shards > 1
    return replace(
        config.optimizer,
        use_distributed_optimizer=True,
        overlap_grad_reduce=overlaps,
        overlap_param_gather=overlaps,
    )


def _references(config: Config, vary: Sequence[str]) -> Iterator:
    own = config.reference
    if not config.objective.needs_reference or "reference" not in vary:
        yield own
    else:
        plain = replace(own, strategy="resident", cache=None, fp8_param=False)
        yield plain
        if plain.precision != "fp8" and not (plain.precision is None and config.training.precision == "fp8"):
            yield replace(plain, fp8_param=True)
        yield replace(plain, strategy="offload")
        if own.strategy == "cached":
            yield own
        if config.lora.dim is not None and same_weights(config) and own.precision is None and own.fp8_recipe is None:
            yield replace(plain, strategy="shared")
    if "cached" in vary and own.strategy != "cached" and config.objective.needs_reference:
        yield replace(own, strategy="cached", cache=CACHE_PLACE, fp8_param=False)


def _divisors(number: int, largest: float) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0 and n <= largest]


def _powers_of_two(largest: int) -> Iterator[int]:
    size = 1
    while size <= largest:
        yield size
        size *= 2


@dataclass(frozen=True)
class SearchInputs:
    """The input of a search.

    Attributes:
        cluster: the cluster.
        images: the shape of the images.
        vary: members of :data:`VARIABLES` that may change beside the layout.
        calibration: calibration of the GPU.
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
    """A configuration that training accepts, and its cost.

    Attributes:
        config: the configuration of the run.
        workload: the rows of a microbatch.
        step: the predicted time of a step.
        num_gpus: number of all GPUs.
    """

    config: Config
    workload: Workload
    step: StepTime
    num_gpus: int

    @cached_property
    def memory(self) -> MemoryEstimate:
        """Memory of the rank that holds most."""
        return predict_memory(self.config, self.num_gpus, self.workload)


def misfit(candidate: Candidate, inputs: SearchInputs) -> str | None:
    """Return why the candidate does not fit into memory; None if it does."""
    needed, limit = candidate.memory.total, inputs.memory_limit
    return None if needed <= limit else f"does not fit: {needed / GIB:.1f} GiB, {limit / GIB:.1f} may be filled"


def candidate_of(config: Config, inputs: SearchInputs) -> Candidate:
    """Return the configuration with its cost.

    Raises:
        UserError: training or the GPU's data sheet refuses the configuration.
    """
    cluster = inputs.cluster
    check_candidate(config, cluster.num_gpus)
    return _timed(config, inputs, image_workload(config, inputs.images))


def _timed(config: Config, inputs: SearchInputs, workload: Workload) -> Candidate:
    step = predict_step(config, inputs.cluster, workload, inputs.calibration)
    return Candidate(config, workload, step, inputs.cluster.num_gpus)


def candidates(config: Config, inputs: SearchInputs) -> Iterator[Candidate]:
    """Yield all candidates, in no order.

    Some of them may not fit.

    Raises:
        UserError: the rows are too long for the model on all layouts.
    """
    problem, is_possible = None, False
    for layout in layouts(config, inputs.cluster, vary_micro_batch="micro_batch" in inputs.vary):
        workloads: dict[int, Workload] = {}
        for one in options(config, layout, inputs.cluster, inputs.vary):
            padded = one.data.pad_to_multiple_of
            try:
                workloads[padded] = workloads.get(padded) or image_workload(one, inputs.images)
            except UserError as error:
                problem = error
                continue
            is_possible = True
            yield _timed(one, inputs, workloads[padded])
    if problem is not None and not is_possible:
        raise problem


def fitting(found: Sequence[Candidate], inputs: SearchInputs, top: int) -> list[Candidate]:
    """Return the first ``top`` candidates that training accepts, that fit into memory, and that are useful.

    A candidate with recomputation is not useful if a faster one has the same layout and needs hardly more memory.
    """
    best: list[Candidate] = []
    for candidate in found:
        if len(best) == top:
            break
        fits = _training_accepts(candidate) and candidate.memory.total <= inputs.memory_limit
        if fits and not any(_makes_pointless(other, candidate) for other in best):
            best.append(candidate)
    return best


def _makes_pointless(other: Candidate, candidate: Candidate) -> bool:
    """Check whether a faster candidate makes another one useless.

    They differ in recomputation only, and the faster one needs hardly more memory.
    """
    differ = ("recompute_granularity", "recompute_modules", "recompute_method", "recompute_num_layers")
    training = replace(candidate.config.training, **{name: getattr(other.config.training, name) for name in differ})
    same = replace(candidate.config, training=training) == other.config
    return same and other.memory.total <= _WORTHWHILE * candidate.memory.total


def _training_accepts(candidate: Candidate) -> bool:
    try:
        check_candidate(candidate.config, candidate.num_gpus)
    except UserError:
        return False
    return True
