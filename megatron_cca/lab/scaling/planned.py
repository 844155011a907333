"""Points that are planned, not run: a task's run, with the layout of its file or of the planner, and its cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from megatron_cca import platform
from megatron_cca.config import Config
from megatron_cca.errors import UserError
from megatron_cca.lab.planner.candidates import Candidate, Layout, Wishes, candidate_of, laid_out, misfit
from megatron_cca.lab.planner.hardware import (
    CPU,
    DEFAULT,
    Calibration,
    Cluster,
    Gpu,
    gpu_named,
    name_of_device,
    read_calibration,
)
from megatron_cca.lab.planner.memory import GIB
from megatron_cca.lab.planner.report import layout_name
from megatron_cca.lab.planner.search import search
from megatron_cca.lab.scaling.points import Record, read_record, write_failed, write_finished
from megatron_cca.lab.scaling.settings import LayoutSettings
from megatron_cca.lab.scaling.sweep import MEASURED, Task
from megatron_cca.training.checks import data_parallel_size


def gpu_of(task: Task) -> str:
    """Return the name of a task's device.

    A measured task runs on this machine's device.

    Raises:
        UserError: this machine's GPU is unknown, and the sweep does not name one.
    """
    if task.kind == MEASURED and not platform.current().is_cuda:
        return CPU
    if task.how["gpu"] is not None:
        return task.how["gpu"]
    called = platform.device_name()
    name = name_of_device(called)
    if name is None:
        raise UserError(f"gpu: name in the sweep's file what {called} is nearest to")
    return name


def planned_candidate(task: Task) -> Candidate:
    """Return the task's run with its predicted cost.

    Raises:
        UserError: an unknown GPU, or a run that training would refuse or that does not fit; one line.
    """
    wishes = _wishes(task)
    if task.layout is None:
        return search(task.config, wishes, 1).best[0]
    candidate = candidate_of(laid_out(task.config, layout_of(task.layout, task)), wishes)
    problem = misfit(candidate, wishes)
    if problem is not None:
        raise UserError(problem)
    return candidate


def layout_of(settings: LayoutSettings, task: Task) -> Layout:
    """Return the planner's form of a layout in a sweep's file."""
    return Layout(
        tensor=settings.tensor_model_parallel_size,
        pipeline=settings.pipeline_model_parallel_size,
        virtual=settings.virtual_pipeline_model_parallel_size,
        context=settings.context_parallel_size,
        micro_batch=settings.micro_batch_size or task.config.training.micro_batch_size,
    )


def _wishes(task: Task) -> Wishes:
    gpu, calibration = _device(task)
    per_node = task.how.get("gpus_per_node") or gpu.gpus_per_node
    return Wishes(Cluster(gpu, task.num_gpus, per_node), task.images, calibration=calibration)


def _device(task: Task) -> tuple[Gpu, Calibration]:
    name = gpu_of(task)
    if task.how["calibration"] is None:
        if name == CPU:
            raise UserError("layouts: planned on a CPU needs calibration, what tools/plan.py calibrate measured on it")
        return gpu_named(name), DEFAULT
    calibration, measured = read_calibration(Path(task.how["calibration"].partition("\n")[0]), name)
    return (measured if name == CPU else gpu_named(name)), calibration


def ideal_bubble(config: Config, num_gpus: int) -> float:
    """Return the bubble of a pipeline whose stages all take the same time: (pp - 1) / (m vpp + pp - 1).

    It is a share of the step.
    """
    parallel, training = config.parallel, config.training
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    microbatches = training.global_batch_size // (training.micro_batch_size * data_parallel_size(config, num_gpus))
    return (stages - 1) / (microbatches * chunks + stages - 1)


def plan_all(output: Path, tasks: Sequence[Task]) -> None:
    """Write a record for each task that has none."""
    missing = [task for task in tasks if read_record(output, task) is None]
    for task in tqdm(missing, desc="planning", unit="point", disable=None, dynamic_ncols=True):
        try:
            write_finished(output, task, plan(task))
        except UserError as error:
            write_failed(output, task, str(error))


def plan(task: Task) -> Record:
    """Return the planner's record of a task.

    Raises:
        UserError: :func:`planned_candidate` refuses the task.
    """
    candidate = planned_candidate(task)
    step, training = candidate.step, candidate.config.training
    return {
        "step_seconds": [step.total],
        "tokens_per_second_per_gpu": step.tokens_per_second_per_gpu,
        "low": step.tokens_per_gpu / step.high,
        "high": step.tokens_per_gpu / step.low if step.low > 0 else step.tokens_per_second_per_gpu,
        "mfu": step.mfu,
        "peak_flops": step.peak_flops,
        "seq_length": candidate.workload.seq_length,
        "memory_gib": candidate.memory.total / GIB,
        "communication": step.communication / step.total,
        "bubble": step.bubble / step.total,
        "layout": layout_name(candidate.config, candidate.num_gpus),
        "micro_batch_size": training.micro_batch_size,
        "global_batch_size": training.global_batch_size,
        "ideal_bubble": ideal_bubble(candidate.config, task.num_gpus),
        "device": task.how["gpu"],
    }
