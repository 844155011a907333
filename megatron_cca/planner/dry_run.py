"""One step of any rank of a job of any size, on one CPU, without memory: what it holds, and what it sends."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from megatron.core import parallel_state

from megatron_cca.config import Config
from megatron_cca.data.microbatches import Microbatch, StepBatch
from megatron_cca.models import resolve_architecture
from megatron_cca.objectives import PairLogps
from megatron_cca.parallel.process_groups import initialize_distributed
from megatron_cca.planner.collectives import Traffic
from megatron_cca.planner.fake_cluster import Observer, fake_job, fake_tensors
from megatron_cca.planner.workload import Workload
from megatron_cca.training.progress import Progress
from megatron_cca.training.setup import Run, build_objective, build_run
from megatron_cca.training.step import train_step


@dataclass(frozen=True)
class DryRun:
    """What one rank holds and sends in a step, counted.

    Attributes:
        parameters: bytes of the policy's parameters on this rank.
        reference: bytes of the reference's on the device.
        gradients: bytes of Megatron's gradient buffers.
        optimizer: bytes of master weights and Adam's moments.
        peak: the most bytes alive at once in the step, of all tensors.
        peaks: the same by phase of the step.
        activations: ``peak`` less what is held all the time.
        traffic: the step's collectives.
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

    Args:
        config: of the run; must have passed ``training.checks.check_new_run``. Its checkpoints are not read.
        world_size: the processes of the job.
        rank: which of them to be.
        workload: the rows of every microbatch.
        like_gpu: whether to count as a GPU would, or as a CPU.
    """
    config = replace(
        config,
        training=replace(config.training, pretrained_checkpoint=None),
        reference=replace(config.reference, checkpoint=None),
    )
    share = workload.image_tokens / workload.seq_length
    with fake_job(rank, world_size):
        initialize_distributed(config)
        with fake_tensors(share, like_gpu=like_gpu) as observer:
            return counted_step(config, workload, observer)


def counted_step(config: Config, workload: Workload, observer: Observer) -> DryRun:
    """Build this rank's run inside an observer and look at one step; of real ranks as of a fake one. Collective."""
    observer.traffic.name_groups(_groups())
    run = _build(config, workload, observer)
    # Adam's moments come with the first update; the step to be looked at has them from the start.
    run.optimizer.step()
    held = observer.now
    observer.start_over()
    train_step(run)
    return DryRun(
        parameters=sum(parameter.nbytes for chunk in run.policy for parameter in chunk.parameters()),
        reference=_reference_bytes(run),
        gradients=sum(buffer.grad_data.nbytes for chunk in run.policy for buffer in chunk.buffers),
        optimizer=_optimizer_bytes(run),
        peak=observer.peak,
        peaks=dict(observer.peaks),
        activations=observer.peak - held,
        traffic=observer.traffic.traffic(),
    )


def _build(config: Config, workload: Workload, observer: Observer) -> Run:
    architecture = resolve_architecture(config.model)
    with_pairs = build_objective(config).batch_type is PairLogps
    batches = _Rows(config.training.micro_batch_size * (2 if with_pairs else 1))
    reader = _Reader(config, workload, batches.rows_per_microbatch)
    return build_run(config, architecture, batches, reader, None, _Phases(observer))


def _reference_bytes(run: Run) -> int:
    chunks = getattr(run.reference, "chunks", [])
    return sum(tensor.nbytes for chunk in chunks for tensor in (*chunk.parameters(), *chunk.buffers()))


def _optimizer_bytes(run: Run) -> int:
    """Of all tensors of the optimizer that are not the model's own."""
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


@dataclass(frozen=True)
class _Rows:
    rows_per_microbatch: int


class _Phases(Progress):
    def __init__(self, observer: Observer) -> None:
        super().__init__()
        self._observer = observer

    def at(self, phase: str, step: int | None = None, *, patience: float = 1.0) -> None:
        self._observer.phase = phase

    def beat(self) -> None:
        pass


class _Reader:
    """Hands out rows of no particular tokens, the first of which are the image's."""

    reads = True

    def __init__(self, config: Config, workload: Workload, rows_per_microbatch: int) -> None:
        self._config, self._workload, self._rows = config, workload, rows_per_microbatch

    def get(self, step: int) -> StepBatch:
        samples = self._config.training.micro_batch_size
        whole = self._config.training.global_batch_size
        microbatches = whole // (samples * parallel_state.get_data_parallel_world_size())
        length = self._workload.seq_length
        rows = [self._microbatch(samples) for _ in range(microbatches)]
        return StepBatch(rows, length, self._workload.image_tokens, whole * length * self._rows // samples)

    def _microbatch(self, samples: int) -> Microbatch:
        shape = (self._rows, self._workload.seq_length)
        tokens = torch.zeros(shape, dtype=torch.int64)
        mask, flags = torch.zeros(shape, dtype=torch.bool), torch.zeros(samples, dtype=torch.bool)
        mask[:, : self._workload.image_tokens] = True
        return Microbatch(tokens, tokens, mask, flags)
