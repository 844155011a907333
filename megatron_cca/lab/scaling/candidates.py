"""From a task to the run that it means: laid out as its file says, or as the planner would."""

from __future__ import annotations

from pathlib import Path

from megatron_cca import platform
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
from megatron_cca.lab.planner.search import search
from megatron_cca.lab.scaling.settings import LayoutSettings
from megatron_cca.lab.scaling.sweep import MEASURED, Task


def gpu_of(task: Task) -> str:
    """The name of the device that a task is about; a measured one's is the device at hand.

    Raises:
        UserError: the GPU at hand is not known and nobody has named one.
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
    """The run with its predicted costs.

    Raises:
        UserError: an unknown GPU, a run that training would refuse or that does not fit; one line.
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
    """The planner's form of a layout in a sweep's file."""
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
