"""One step of any rank of a job of any size, on one CPU and without memory: the bytes that it holds and sends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from megatron.core import parallel_state

from megatron_cca import platform
from megatron_cca.config import Config, OptimizerConfig
from megatron_cca.data.microbatches import Microbatch, StepBatch
from megatron_cca.lab.planner.fake_cluster import fake_job, fake_tensors
from megatron_cca.lab.planner.observer import Observer, Traffic
from megatron_cca.lab.planner.random_weights import draw_everything
from megatron_cca.lab.planner.workload import Workload
from megatron_cca.models import resolve_architecture
from megatron_cca.parallel.ranks import initialize_distributed
from megatron_cca.training import rows_per_microbatch
from megatron_cca.training.checks import STATE_DTYPES, data_parallel_size
from megatron_cca.training.setup import Run, build_run
from megatron_cca.training.step import train_step
from megatron_cca.training.watchdog import PhaseTracker


@dataclass(frozen=True)
class DryRun:
    """The counted bytes that one rank holds and sends in a step.

    Attributes:
        parameters: bytes of the policy's parameters on this rank, and of its frozen tensors.
        reference: bytes of the reference on the device.
        gradients: bytes of Megatron's gradient buffers.
        optimizer: bytes of master weights and Adam's moments.
        peak: the most bytes of all tensors alive at the same time in the step.
        peaks: the peak of each phase of the step.
        activations: ``peak`` less the four parts above, which live during the whole step.
        traffic: collectives of the step.
    """

    parameters: int
    reference: int
    gradients: int
    optimizer: int
    peak: int
    peaks: dict[str, int]
    activations: int
    traffic: list[Traffic]


def dry_run(config: Config, world_size: int, rank: int, workload: Workload, *, like_gpu: bool) -> DryRun:
    """Build the real model of a rank on fake process groups and take one training step.

    Instead of a step with many microbatches it takes two short ones: one with a few microbatches, and one with as many
    more as the pipeline has stages. From there on each microbatch adds the same bytes.

    Args:
        config: configuration of the run; must have passed ``training.checks.check_new_run``. Its checkpoints are not
            read. FP8 products count as bf16, because Transformer Engine needs a GPU.
        world_size: number of processes of the job.
        rank: the rank to build.
        workload: the rows of each microbatch.
        like_gpu: whether to count as on a GPU; otherwise as on a CPU.
    """
    config = _runnable(config, like_gpu)
    unit = config.training.micro_batch_size * data_parallel_size(config, world_size)
    share = workload.image_tokens / workload.seq_length
    with fake_job(rank, world_size):
        initialize_distributed(config)
        with fake_tensors(share, like_gpu=like_gpu) as observer:
            return counted_step(config, workload, observer, config.training.global_batch_size // unit)


def counted_step(
    config: Config, workload: Workload, observer: Observer, microbatches: int, *, run_all: bool = False
) -> DryRun:
    """Build this rank's run inside an observer and count a step. Collective.

    It works for real ranks and for a fake one.

    Args:
        config, workload: as in :func:`dry_run`.
        observer: an observer whose context is open.
        microbatches: number of this rank's microbatches in the step.
        run_all: whether to run all microbatches, even if there are many.
    """
    # The rows are made up, so no data has anything to give.
    config = replace(config, data=replace(config.data, path={}))
    observer.traffic.name_groups(_groups())
    rows = _Rows(config, workload)
    architecture, initialize = resolve_architecture(config.model), draw_everything if observer.has_numbers else None
    run = build_run(config, architecture, rows, rows, None, _Phases(observer), initialize=initialize)
    # The first update creates Adam's moments. The counted step must have them from its start.
    run.optimizer.step()
    # After so many microbatches all stages have their full number of microbatches and chunks in flight.
    stages = config.parallel.pipeline_model_parallel_size
    few = stages * (2 if config.parallel.virtual_pipeline_model_parallel_size else 1)
    # A step leaves buffers behind, which a later one must not count as its own. From the second on, steps are alike.
    _one_step(run, observer, rows, few)
    if run_all or microbatches <= few + stages:
        return _one_step(run, observer, rows, microbatches)
    first, second = (_one_step(run, observer, rows, number) for number in (few, few + stages))
    return _continued(first, second, (microbatches - few - stages) / stages)


def _one_step(run: Run, observer: Observer, rows: _Rows, microbatches: int) -> DryRun:
    observer.start_over()
    rows.microbatches = microbatches
    train_step(run)
    held = {
        "parameters": _weight_bytes(run.policy_chunks),
        "reference": _weight_bytes(getattr(run.reference, "chunks", [])),
        "gradients": sum(buffer.grad_data.nbytes for chunk in run.policy for buffer in chunk.buffers),
        "optimizer": _optimizer_bytes(run),
    }
    return DryRun(
        **held,
        peak=observer.peak,
        peaks=dict(observer.peaks),
        activations=observer.peak - sum(held.values()),
        traffic=observer.traffic.traffic(),
    )


def _continued(few: DryRun, more: DryRun, times: float) -> DryRun:
    """Return the step that has ``times`` more of the difference between ``more`` and ``few``."""

    def on(first: int, second: int) -> int:
        return round(second + times * (second - first))

    seen = {(one.group, one.operation, one.phase): one for one in few.traffic}
    traffic = []
    for one in more.traffic:
        before = seen[one.group, one.operation, one.phase]
        calls, num_bytes = on(before.calls, one.calls), on(before.num_bytes, one.num_bytes)
        traffic.append(replace(one, calls=calls, num_bytes=num_bytes))
    return replace(
        more,
        peak=on(few.peak, more.peak),
        peaks={phase: on(few.peaks[phase], peak) for phase, peak in more.peaks.items()},
        activations=on(few.activations, more.activations),
        traffic=traffic,
    )


def _runnable(config: Config, like_gpu: bool) -> Config:
    """Return the run with random weights, without what needs Transformer Engine or a GPU."""
    training, reference, kernels = config.training, replace(config.reference, checkpoint=None), config.kernels
    bf16 = "bf16" if training.precision == "fp8" else training.precision
    if reference.precision == "fp8":
        reference = replace(reference, precision="bf16")
    if like_gpu:
        kernels = replace(
            kernels,
            bias_activation_fusion=kernels.bias_activation_fusion is not False,
            bias_dropout_fusion=kernels.bias_dropout_fusion is not False,
        )
    return replace(
        config,
        model=replace(config.model, transformer_impl="local"),
        parallel=replace(config.parallel, tp_comm_overlap=False),
        training=replace(training, pretrained_checkpoint=None, precision=bf16),
        reference=reference,
        kernels=replace(kernels, gradient_accumulation_fusion=False, apply_rope_fusion=False, cuda_graph_impl="none"),
        optimizer=_optimizer_of_any_machine(config.optimizer),
    )


def _optimizer_of_any_machine(options: OptimizerConfig) -> OptimizerConfig:
    dtypes = dict.fromkeys(STATE_DTYPES, "fp32")
    off = ("use_precision_aware_optimizer", "optimizer_cpu_offload", "overlap_cpu_optimizer_d2h_h2d")
    return replace(options, **dtypes, **dict.fromkeys(off, False))


def _weight_bytes(chunks: Sequence[torch.nn.Module]) -> int:
    return sum(tensor.nbytes for chunk in chunks for tensor in (*chunk.parameters(), *chunk.buffers()))


def _optimizer_bytes(run: Run) -> int:
    """Return the bytes of the optimizer's tensors that do not belong to the model."""
    own = {parameter.untyped_storage()._cdata for chunk in run.policy for parameter in chunk.parameters()}
    optimizers = getattr(run.optimizer, "chained_optimizers", [run.optimizer])
    tensors = {}
    for optimizer in optimizers:
        inner = optimizer.optimizer
        for group in inner.param_groups:
            for parameter in group["params"]:
                if parameter.untyped_storage()._cdata not in own:
                    tensors[id(parameter)] = parameter
                tensors |= {id(value): value for value in inner.state[parameter].values() if torch.is_tensor(value)}
    return sum(tensor.nbytes for tensor in tensors.values())


def _groups() -> dict[str, torch.distributed.ProcessGroup]:
    get = parallel_state
    return {
        "tensor": get.get_tensor_model_parallel_group(),
        "pipeline": get.get_pipeline_model_parallel_group(),
        "context": get.get_context_parallel_group(),
        "data": get.get_data_parallel_group(),
        "data and context": get.get_data_parallel_group(with_context_parallel=True),
        "model": get.get_model_parallel_group(),
        "tensor and context": get.get_tensor_and_context_parallel_group(),
    }


class _Phases(PhaseTracker):
    def __init__(self, observer: Observer) -> None:
        super().__init__()
        self._observer = observer

    def at(self, phase: str, step: int | None = None, *, patience: float = 1.0) -> None:
        self._observer.phase = phase

    def beat(self) -> None:
        pass


class _Rows:
    """A substitute for the data.

    All tokens of a row are 0, behind the class of models that have classes. Its first tokens count as image tokens.
    """

    reads = True

    def __init__(self, config: Config, workload: Workload) -> None:
        self.microbatches = 1
        self._samples, self._workload = config.training.micro_batch_size, workload
        self.rows_per_microbatch = rows_per_microbatch(config)
        self._first = getattr(resolve_architecture(config.model).vocabulary, "null_class", 0)

    def attempt(self, step: int) -> tuple[StepBatch, None]:
        """Return a step of ``microbatches`` microbatches, and None for the error.

        This read cannot fail.
        """
        length = self._workload.seq_length
        rows = [self._microbatch() for _ in range(self.microbatches)]
        return StepBatch(rows, length, self._workload.image_tokens, num_tokens=length), None

    def _microbatch(self) -> Microbatch:
        rows, length, device = self.rows_per_microbatch, self._workload.seq_length, platform.device()
        ids = torch.zeros((rows, length + 1), dtype=torch.int64, device=device)
        ids[:, 0] = self._first
        mask = torch.zeros((rows, length), dtype=torch.bool, device=device)
        mask[:, : self._workload.image_tokens] = True
        flags = torch.zeros(self._samples, dtype=torch.bool, device=device)
        return Microbatch(ids[:, :-1], ids[:, 1:], mask, flags)
