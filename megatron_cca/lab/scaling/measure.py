"""The numbers of a point of a sweep: measured on this job's ranks, or planned without them."""

from __future__ import annotations

import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from tqdm import tqdm

from megatron_cca import platform
from megatron_cca.config import Config, Precision
from megatron_cca.errors import UserError
from megatron_cca.lab.planner.candidates import Candidate, Layout, SearchInputs, candidate_of, laid_out, misfit
from megatron_cca.lab.planner.hardware import (
    CPU,
    Calibration,
    Cluster,
    Gpu,
    calibrated_device,
    gpu_named,
    name_of_device,
)
from megatron_cca.lab.planner.measuring import (
    measurable,
    on_random_shards,
    peak_flops,
    started,
    timed_step,
    write_random_shards,
)
from megatron_cca.lab.planner.memory import GIB
from megatron_cca.lab.planner.report import layout_name
from megatron_cca.lab.planner.search import search
from megatron_cca.lab.planner.workload import average_peak, flops_by_precision, image_workload, mfu
from megatron_cca.lab.scaling import LayoutSettings
from megatron_cca.lab.scaling.sweep import MEASURED, Point, Record, read_record, write_failed, write_finished
from megatron_cca.lab.scaling.waiting import Span, Waiting, merged, shortest, timed_collectives, traced_kernels, waiting
from megatron_cca.models import resolve_architecture
from megatron_cca.parallel.ranks import initialize_distributed
from megatron_cca.training import reference_settings, rows_per_sample
from megatron_cca.training.checks import data_parallel_size
from megatron_cca.training.kernel_checks import check_devices
from megatron_cca.training.setup import Run


def gpu_of(point: Point) -> str:
    """Return the name of a point's device.

    A measured point runs on this machine's device.

    Raises:
        UserError: this machine's GPU is unknown, and the sweep does not name one.
    """
    if point.kind == MEASURED and not platform.current().is_cuda:
        return CPU
    if point.how["gpu"] is not None:
        return point.how["gpu"]
    called = platform.device_name()
    name = name_of_device(called)
    if name is None:
        raise UserError(f"gpu: name in the sweep's file what {called} is nearest to")
    return name


def planned_candidate(point: Point) -> Candidate:
    """Return the point's run with its predicted cost.

    Raises:
        UserError: an unknown GPU, or a run that training would refuse or that does not fit; one line.
    """
    inputs = _search_inputs(point)
    if point.layout is None:
        return search(point.config, inputs, 1).best[0]
    candidate = candidate_of(laid_out(point.config, layout_of(point.layout, point)), inputs)
    problem = misfit(candidate, inputs)
    if problem is not None:
        raise UserError(problem)
    return candidate


def layout_of(settings: LayoutSettings, point: Point) -> Layout:
    """Return the planner's form of a layout in a sweep's file."""
    return Layout(
        tensor=settings.tensor_model_parallel_size,
        pipeline=settings.pipeline_model_parallel_size,
        virtual=settings.virtual_pipeline_model_parallel_size,
        context=settings.context_parallel_size,
        micro_batch=settings.micro_batch_size or point.config.training.micro_batch_size,
    )


def _search_inputs(point: Point) -> SearchInputs:
    gpu, calibration = _device(point)
    per_node = point.how.get("gpus_per_node") or gpu.gpus_per_node
    return SearchInputs(Cluster(gpu, point.num_gpus, per_node), point.images, calibration=calibration)


def _device(point: Point) -> tuple[Gpu, Calibration]:
    name, calibration = gpu_of(point), point.how["calibration"]
    if calibration is None and name == CPU:
        raise UserError("layouts: planned on a CPU needs calibration, what megatron-cca plan calibrate measured on it")
    return calibrated_device(name, None if calibration is None else Path(calibration.partition("\n")[0]))


def ideal_bubble(config: Config, num_gpus: int) -> float:
    """Return the bubble of a pipeline whose stages all take the same time: (pp - 1) / (m vpp + pp - 1).

    It is a share of the step.
    """
    parallel, training = config.parallel, config.training
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    microbatches = training.global_batch_size // (training.micro_batch_size * data_parallel_size(config, num_gpus))
    return (stages - 1) / (microbatches * chunks + stages - 1)


def plan_all(output: Path, points: Sequence[Point]) -> None:
    """Write a record for each point that has none."""
    missing = [point for point in points if read_record(output, point) is None]
    for point in tqdm(missing, desc="planning", unit="point", disable=None, dynamic_ncols=True):
        try:
            write_finished(output, point, plan(point))
        except UserError as error:
            write_failed(output, point, str(error))


def plan(point: Point) -> Record:
    """Return the planner's record of a point.

    Raises:
        UserError: :func:`planned_candidate` refuses the point.
    """
    candidate = planned_candidate(point)
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
        "ideal_bubble": ideal_bubble(candidate.config, point.num_gpus),
        "device": point.how["gpu"],
    }


def measure(point: Point, config: Config) -> dict[str, Any]:
    """Measure the point on this job.

    Args:
        point: the point of the sweep.
        config: the configuration on its layout.

    Returns:
        Plain data for :mod:`megatron_cca.lab.scaling.sweep`, the same on every rank.

    Raises:
        UserError: a run that training refuses on this device, or a step without an update.
    """
    # A thread reads ahead. With the default of 5 ms, this thread would wait as long for the interpreter each time.
    sys.setswitchinterval(1e-4)
    config = measurable(config)
    check_devices(config)
    initialize_distributed(config)
    peaks = _peak_flops(point, config)
    with _folder_of_this_node() as (folder, writes):
        if writes:
            write_random_shards(config, point.images, folder)
        dist.barrier()
        steps = [point.how[name] for name in ("warmup_steps", "steps", "profiled_steps")]
        config = on_random_shards(config, folder, sum(steps))
        platform.reset_peak_memory()
        with started(config) as run:
            seconds = _timed(run, steps[0], steps[1])
            memory = _all(platform.peak_memory_bytes())
            shares = _all(_profiled(run, steps[2]))
    return {**_speed(point, config, seconds, peaks), **_about_ranks(memory, shares), **_about_layout(point, config)}


def _peak_flops(point: Point, config: Config) -> dict[Precision, float]:
    """Return the peak FLOP/s of the device by precision.

    A GPU's come from its data sheet. A processor's are those of a product on one rank, while the other ranks are idle.
    """
    name = gpu_of(point)
    if name != CPU:
        return gpu_named(name).flops
    found = [_processor_peaks(config) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    return found[0]


def _processor_peaks(config: Config) -> dict[Precision, float]:
    wanted = {config.training.precision, reference_settings(config).precision}
    return {one: peak_flops(torch.float32 if one == "fp32" else torch.bfloat16) for one in wanted}


@contextmanager
def _folder_of_this_node() -> Iterator[tuple[Path, bool]]:
    """Yield a new folder that the ranks of this machine share, and whether this rank must fill it."""
    mine = platform.host_name()
    hosts = _all(mine)
    writes = hosts.index(mine) == dist.get_rank()
    folders = _all(mkdtemp(prefix="megatron_cca_scaling_") if writes else None)
    folder = Path(folders[hosts.index(mine)])
    try:
        yield folder, writes
    finally:
        if writes:
            shutil.rmtree(folder, ignore_errors=True)


def _all(value: Any) -> list[Any]:
    """Return the value of each rank."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def _timed(run: Run, warmup: int, steps: int) -> list[float]:
    """Return the seconds of each step on the slowest rank.

    The other ranks wait for it in the next step.
    """
    seconds = [_step(run) for _ in range(warmup + steps)][warmup:]
    return [max(ranks) for ranks in zip(*_all(seconds), strict=True)]


def _step(run: Run) -> float:
    seconds, report = timed_step(run)
    if report.problem is not None:
        raise UserError(f"step {run.iteration - 1}: {report.problem}")
    return seconds


def _profiled(run: Run, steps: int) -> Waiting:
    stages = _all(parallel_state.get_pipeline_model_parallel_rank())
    dist.barrier()
    watch = traced_kernels if platform.current().is_cuda else timed_collectives
    with watch(stages.__getitem__) as found:
        start = time.perf_counter()
        for _ in range(steps):
            _step(run)
        seconds = time.perf_counter() - start
    spans: list[Span] = found.spans
    return waiting(spans, merged(_all(shortest(spans))), seconds)


def _speed(point: Point, config: Config, seconds: list[float], peaks: dict[Precision, float]) -> dict[str, Any]:
    workload, batch = image_workload(config, point.images), config.training.global_batch_size
    tokens = rows_per_sample(config) * workload.seq_length * batch / point.num_gpus
    flops = flops_by_precision(config, resolve_architecture(config.model), workload)
    peak = average_peak(flops, peaks.__getitem__)
    typical = statistics.median(seconds)
    return {
        "step_seconds": seconds,
        "tokens_per_second_per_gpu": tokens / typical,
        "low": tokens / max(seconds),
        "high": tokens / min(seconds),
        "mfu": mfu(sum(flops.values()) * batch / point.num_gpus, typical, peak),
        "peak_flops": peak,
        "seq_length": workload.seq_length,
    }


def _about_ranks(memory: list[int], shares: list[Waiting]) -> dict[str, Any]:
    return {
        "memory_gib": max(memory) / GIB,
        "communication": statistics.fmean(one.communication for one in shares),
        "bubble": statistics.fmean(one.bubble for one in shares),
        "ranks": {
            "memory_gib": [size / GIB for size in memory],
            "communication": [one.communication for one in shares],
            "bubble": [one.bubble for one in shares],
        },
    }


def _about_layout(point: Point, config: Config) -> dict[str, Any]:
    return {
        "layout": layout_name(config, point.num_gpus),
        "micro_batch_size": config.training.micro_batch_size,
        "global_batch_size": config.training.global_batch_size,
        "ideal_bubble": ideal_bubble(config, point.num_gpus),
    }
