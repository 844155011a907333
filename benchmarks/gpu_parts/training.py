"""Whole CCA steps of the project's own run on random tokens: time, memory, MFU, and the planner's prediction."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from gpu_parts.lines import spread_ms
from megatron_cca import platform
from megatron_cca.config import Config
from megatron_cca.config.load import load_config
from megatron_cca.errors import UserError
from megatron_cca.lab.planner.hardware import DEFAULT, Calibration, Cluster, Gpu, gpu_named, name_of_device
from megatron_cca.lab.planner.measuring import (
    measurable,
    on_random_shards,
    peak_flops,
    started,
    timed_step,
    write_random_shards,
)
from megatron_cca.lab.planner.memory import predict_memory
from megatron_cca.lab.planner.observer import LiveBytes
from megatron_cca.lab.planner.throughput import predict_step
from megatron_cca.lab.planner.workload import (
    ImageShape,
    Workload,
    average_peak,
    flops_by_precision,
    image_workload,
    mfu,
)
from megatron_cca.models import resolve_architecture
from megatron_cca.models.num_parameters import num_parameters
from megatron_cca.parallel.ranks import initialize_distributed
from megatron_cca.training import rows_per_sample
from megatron_cca.training.kernel_checks import check_devices
from megatron_cca.training.setup import Run

CAPTION_TOKENS = 32
WARM_UP, FEWEST = 2, 3
_LARGE_SIDE = 8192


def measure(values: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Measure a training step.

    Args:
        values: ``overrides`` of the configuration, ``grid`` of the images, and the number of timed ``repeats``.
        seconds: after so many seconds no further repetition begins, once there are a few.
    """
    began = time.monotonic()
    config, images = configured(values)
    workload = image_workload(config, images)
    check_devices(config)
    initialize_distributed(config)
    with TemporaryDirectory() as folder, _counted() as counter:
        write_random_shards(config, images, Path(folder))
        config_here = on_random_shards(config, Path(folder), WARM_UP + values["repeats"])
        with started(config_here, initialize=draw_on_the_device) as run:
            deadline = began + seconds
            found = _timed(run, values["repeats"], deadline, counter)
    return {**found, **_rates(config, workload, found["ms"]["median"]), "predicted": predictions(config, workload)}


def configured(values: dict[str, Any]) -> tuple[Config, ImageShape]:
    """Return the configuration of a setting's run, and its images."""
    grid = values["grid"]
    config = measurable(load_config(None, values["overrides"]))
    vocabulary = resolve_architecture(config.model).vocabulary
    caption_tokens = CAPTION_TOKENS if vocabulary.num_classes is None else 1
    return config, ImageShape(grid, grid, caption_tokens)


def _timed(run: Run, repeats: int, deadline: float, counter: LiveBytes | None) -> dict[str, Any]:
    first = [_step(run) for _ in range(WARM_UP)]
    if counter is None:
        platform.reset_peak_memory()
    else:
        counter.reset_peak()
    seconds: list[float] = []
    while len(seconds) < repeats and (len(seconds) < FEWEST or time.monotonic() < deadline):
        seconds.append(_step(run)[0])
    spread = first[0][1].log_ratio
    return {
        "ms": spread_ms(seconds),
        "repetitions": len(seconds),
        "peak_bytes": platform.peak_memory_bytes() if counter is None else counter.peak,
        "first_log_ratio": None if spread is None else spread.worst,
    }


def _step(run: Run):
    seconds, report = timed_step(run)
    if report.problem is not None:
        raise RuntimeError(f"step {run.iteration - 1}: {report.problem}")
    return seconds, report


def _counted() -> AbstractContextManager[LiveBytes | None]:
    """Return a counter of live tensors on a CPU, and none on a GPU.

    The resident set of a process is much larger than a tiny model.
    """
    return nullcontext() if platform.current().is_cuda else LiveBytes()


@torch.no_grad()
def draw_on_the_device(model: torch.nn.Module, *, seed: int, std: float, **_sizes: int | None) -> None:
    """Draw random weights on the device.

    A processor would take longer than the measurement to draw billions of them. The weights depend only on names and
    seed. A policy and its reference start with the same ones.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            parameter.fill_(1.0)
            continue
        digest = sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator(parameter.device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        parameter.normal_(0.0, std, generator=generator)


def _rates(config: Config, workload: Workload, milliseconds: float) -> dict[str, Any]:
    """Return tokens and FLOPs per second, and the project's MFU (``planner.workload.MFU_MEANS``)."""
    architecture, batch = resolve_architecture(config.model), config.training.global_batch_size
    tokens = rows_per_sample(config) * workload.seq_length * batch
    by_precision = flops_by_precision(config, architecture, workload)
    flops = sum(by_precision.values()) * batch
    peak, source = _peak(by_precision)
    seconds = milliseconds / 1e3
    return {
        "rows": rows_per_sample(config) * batch,
        "seq_length": workload.seq_length,
        "parameters": num_parameters(architecture),
        "tokens_per_second": tokens / seconds,
        "model_tflop": flops / 1e12,
        "tflops": flops / seconds / 1e12,
        "mfu": None if peak is None else mfu(flops, seconds, peak),
        "peak_tflops": None if peak is None else peak / 1e12,
        "peak_from": source,
    }


def _peak(flops: dict[str, float]) -> tuple[float | None, str]:
    """Return the peak FLOP/s of the device for these FLOPs by precision, and the source of the peak.

    A CPU has none.
    """
    gpu = known_gpu()
    if gpu is not None:
        return average_peak(flops, gpu.peak_flops), "data sheet"
    if not platform.current().is_cuda:
        return None, "a CPU has no MFU"
    if "fp8" in flops:
        return None, "the FP8 peak of this GPU is not known"
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    found = average_peak(flops, lambda precision: peak_flops(dtypes[precision], _LARGE_SIDE))
    return found, f"products of {_LARGE_SIDE:,} squared, measured"


def known_gpu() -> Gpu | None:
    """Return this device; None if its data sheet is not known."""
    name = name_of_device(platform.device_name()) if platform.current().is_cuda else None
    return None if name is None else gpu_named(name)


def predictions(
    config: Config, workload: Workload, gpu: Gpu | None = None, calibration: Calibration = DEFAULT
) -> dict[str, float | None]:
    """Return the planner's bytes and milliseconds.

    The bytes are those that an allocator counts. The milliseconds are None for an unknown device.
    """
    memory = predict_memory(config, 1, workload, on_gpu=platform.current().is_cuda)
    gpu = gpu or known_gpu()
    step = None
    if gpu is not None:
        try:
            step = predict_step(config, Cluster(gpu, 1, 1), workload, calibration)
        except UserError:
            # An earlier check refused a precision that the device does not have.
            step = None
    return {"peak_bytes": memory.total - memory.overhead, "ms": None if step is None else 1e3 * step.total}
