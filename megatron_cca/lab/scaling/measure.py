"""The measurement of one point of a sweep: real steps on random tokens. Collective over all ranks of the job."""

from __future__ import annotations

import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_cca import platform
from megatron_cca.config import Config, Precision
from megatron_cca.errors import UserError
from megatron_cca.lab.planner.flops import average_peak, flops_by_precision, mfu
from megatron_cca.lab.planner.hardware import CPU, gpu_named
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
from megatron_cca.lab.planner.workload import image_workload
from megatron_cca.lab.scaling.planned import gpu_of, ideal_bubble
from megatron_cca.lab.scaling.sweep import Task
from megatron_cca.lab.scaling.waiting import Span, Waiting, merged, shortest, timed_collectives, traced_kernels, waiting
from megatron_cca.models import resolve_architecture
from megatron_cca.parallel.process_groups import initialize_distributed
from megatron_cca.training.kernel_checks import check_devices
from megatron_cca.training.reference_settings import reference_settings
from megatron_cca.training.setup import Run
from megatron_cca.training.shapes import rows_per_sample


def measure(task: Task, config: Config) -> dict[str, Any]:
    """Measure the point on this job.

    Args:
        task: the point.
        config: the configuration on its layout.

    Returns:
        Plain data for :mod:`megatron_cca.lab.scaling.points`, the same on every rank.

    Raises:
        UserError: a run that training refuses on this device, or a step without an update.
    """
    # A thread reads ahead. With the default of 5 ms, this thread would wait as long for the interpreter each time.
    sys.setswitchinterval(1e-4)
    config = measurable(config)
    check_devices(config)
    initialize_distributed(config)
    peaks = _peak_flops(task, config)
    with _folder_of_this_node() as (folder, writes):
        if writes:
            write_random_shards(config, task.images, folder)
        dist.barrier()
        steps = [task.how[name] for name in ("warmup_steps", "steps", "profiled_steps")]
        config = on_random_shards(config, folder, sum(steps))
        platform.reset_peak_memory()
        with started(config) as run:
            seconds = _timed(run, steps[0], steps[1])
            memory = _all(platform.peak_memory_bytes())
            shares = _all(_profiled(run, steps[2]))
    return {**_speed(task, config, seconds, peaks), **_about_ranks(memory, shares), **_about_layout(task, config)}


def _peak_flops(task: Task, config: Config) -> dict[Precision, float]:
    """Return the peak FLOP/s of the device by precision.

    A GPU's come from its data sheet. A processor's are those of a product on one rank, while the other ranks are idle.
    """
    name = gpu_of(task)
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


def _speed(task: Task, config: Config, seconds: list[float], peaks: dict[Precision, float]) -> dict[str, Any]:
    workload, batch = image_workload(config, task.images), config.training.global_batch_size
    tokens = rows_per_sample(config) * workload.seq_length * batch / task.num_gpus
    flops = flops_by_precision(config, resolve_architecture(config.model), workload)
    peak = average_peak(flops, peaks.__getitem__)
    typical = statistics.median(seconds)
    return {
        "step_seconds": seconds,
        "tokens_per_second_per_gpu": tokens / typical,
        "low": tokens / max(seconds),
        "high": tokens / min(seconds),
        "mfu": mfu(sum(flops.values()) * batch / task.num_gpus, typical, peak),
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


def _about_layout(task: Task, config: Config) -> dict[str, Any]:
    return {
        "layout": layout_name(config, task.num_gpus),
        "micro_batch_size": config.training.micro_batch_size,
        "global_batch_size": config.training.global_batch_size,
        "ideal_bubble": ideal_bubble(config, task.num_gpus),
    }
