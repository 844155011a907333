"""Calibration from measurements: first single operations on the device, then whole steps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from tqdm import tqdm

from megatron_cca import platform
from megatron_cca.config import Config
from megatron_cca.errors import UserError
from megatron_cca.lab.planner import measuring
from megatron_cca.lab.planner.hardware import CPU, DEFAULT, GPUS, Calibration, Cluster, Gpu, gpu_named, name_of_device
from megatron_cca.lab.planner.measuring import Observation, measure_short_run, short_configs
from megatron_cca.lab.planner.random_weights import draw_everything
from megatron_cca.lab.planner.throughput import predict_step
from megatron_cca.lab.planner.workload import ImageShape, Product, attention_forward, image_workload, products
from megatron_cca.models import resolve_architecture
from megatron_cca.models.initialization import Initialize
from megatron_cca.training import rows_per_sample
from megatron_cca.training.kernel_checks import check_devices

# Each side of an FP8 product is a multiple of it (cuBLASLt).
FP8_MULTIPLE = 16
# The most tokens in the measurements of single products and of attention.
_MOST_TOKENS = 16384
# Larger than any cache.
_LARGE_BYTES = 2**28


@dataclass(frozen=True)
class Measured:
    """A calibration and its measurements.

    Attributes:
        gpu: the device, as predictions need it.
        calibration: the fitted calibration.
        has_fp8: whether FP8 products were measured; otherwise the defaults stand.
        observations: measurements of the short runs.
        errors: for each run, the error of its prediction from the other runs, as a share of the measured time.
    """

    gpu: Gpu
    calibration: Calibration
    has_fp8: bool
    observations: list[Observation]
    errors: list[float]


def calibrate(
    config: Config,
    images: ImageShape,
    gpu: str | None,
    steps: int,
    *,
    initialize: Initialize = draw_everything,
) -> Measured:
    """Measure this device with a run's shapes.

    The platform must be installed.

    Args:
        config: configuration of the run.
        images: the shape of all samples.
        gpu: the device's name; None asks the driver.
        steps: steps of each short run.
        initialize: draws the short runs' weights.

    Raises:
        UserError: an unknown GPU without ``gpu``, or anything that training refuses on this device.
    """
    configs = short_configs(config)
    check_devices(configs[0])
    device = _device(gpu, config, images)
    base, has_fp8 = _by_itself(config, images, device)
    with TemporaryDirectory() as folder:
        bar = tqdm(configs, desc="short runs", unit="run", disable=None)
        observations = [
            measure_short_run(one, images, steps, Path(folder) / str(index), initialize=initialize)
            for index, one in enumerate(bar)
        ]
    calibration, errors = fit(observations, device, base)
    return Measured(device, replace(calibration, gpu=device.name), has_fp8, observations, errors)


def _device(name: str | None, config: Config, images: ImageShape) -> Gpu:
    if not platform.current().is_cuda:
        if name not in (None, CPU):
            raise UserError(f"--gpu: {name}, but this machine has no GPU; leave it out to measure the processor")
        return _cpu(config, images)
    if name is None:
        called = platform.device_name()
        name = name_of_device(called)
        if name is None:
            raise UserError(f"--gpu: name what {called} is nearest to; known: {', '.join(GPUS)}")
    return gpu_named(name)


def _cpu(config: Config, images: ImageShape) -> Gpu:
    """Return the processor in the form of a GPU.

    A large product and a copy of activations give its peaks.
    """
    precision = config.training.precision
    flops = {one: measuring.peak_flops(_dtype(one)) for one in {"fp32", "bf16", precision} - {"fp8"}}
    memory = measuring.memory_bandwidth(_activation_bytes(config, images))
    return Gpu(CPU, measuring.host_memory_bytes(), flops, memory, memory, memory, memory, gpus_per_node=1)


def _activation_bytes(config: Config, images: ImageShape) -> int:
    """Return the bytes of the widest tensor that element-wise operations read.

    A processor may hold it in its caches.
    """
    tokens = config.training.micro_batch_size * rows_per_sample(config) * image_workload(config, images).seq_length
    return min(4 * tokens * resolve_architecture(config.model).ffn_hidden_size, _LARGE_BYTES)


def _dtype(precision: str) -> torch.dtype:
    return torch.float32 if precision == "fp32" else torch.bfloat16


def _by_itself(config: Config, images: ImageShape, gpu: Gpu) -> tuple[Calibration, bool]:
    """Return the efficiencies of single operations at the run's shapes, and whether FP8 was measured.

    The operations are products, attention and memory copies. Nothing else runs at the same time.
    """
    architecture, workload = resolve_architecture(config.model), image_workload(config, images)
    precision = "fp32" if config.training.precision == "fp32" else "bf16"
    rows = config.training.micro_batch_size * rows_per_sample(config)
    rows = max(1, min(rows, _MOST_TOKENS // workload.seq_length))
    tokens, dtype = rows * workload.seq_length, _dtype(precision)
    shapes = products(architecture)
    seconds = measuring.products_seconds(shapes, tokens, dtype)
    matmul = _ideal_seconds(shapes, tokens, gpu, precision) / seconds
    attention = measuring.attention_seconds(rows, architecture, workload.seq_length, dtype)
    attention_flops = rows * attention_forward(architecture, workload.seq_length)
    fp8 = measured_fp8(shapes, tokens, gpu)
    found = replace(
        DEFAULT,
        matmul_efficiency=matmul,
        # Where FP8 products cannot be measured, they keep the default ratio to those in bf16.
        fp8_matmul_efficiency=fp8 or DEFAULT.fp8_matmul_efficiency / DEFAULT.matmul_efficiency * matmul,
        attention_efficiency=attention_flops / attention / gpu.flops[precision],
        memory_efficiency=measuring.memory_bandwidth(_activation_bytes(config, images)) / gpu.memory_bandwidth,
        # Whole steps include these times.
        layer_launch_seconds=0.0,
        microbatch_overhead_seconds=0.0,
        step_overhead_seconds=0.0,
    )
    return found, fp8 is not None


def measured_fp8(shapes: Sequence[Product], tokens: int, gpu: Gpu) -> float | None:
    """Return the share of the FP8 peak that a layer's products reach.

    It is None if the GPU has no FP8, or if the widths are no multiples of ``FP8_MULTIPLE``.
    """
    tokens -= tokens % FP8_MULTIPLE
    fits = tokens > 0 and all(one.inputs % FP8_MULTIPLE == one.outputs % FP8_MULTIPLE == 0 for one in shapes)
    if "fp8" not in gpu.flops or not fits:
        return None
    return _ideal_seconds(shapes, tokens, gpu, "fp8") / measuring.fp8_products_seconds(shapes, tokens)


def _ideal_seconds(shapes: Sequence[Product], tokens: int, gpu: Gpu, precision: str) -> float:
    """Return the seconds of the products at an efficiency of 1.

    The loss from short sides still counts.
    """
    unit = replace(DEFAULT, matmul_efficiency=1.0, fp8_matmul_efficiency=1.0)
    return sum(
        2 * tokens * one.weights / gpu.flops[precision] / unit.matmul(precision, min(tokens, one.inputs, one.outputs))
        for one in shapes
    )


def fit(observations: Sequence[Observation], gpu: Gpu, base: Calibration) -> tuple[Calibration, list[float]]:
    """Fit a calibration to the observations; return it with the error of each prediction.

    It minimises the relative errors. It fits three numbers: the slowdown of all computation against single operations,
    and the overheads of a microbatch and of a step. The error of an observation is that of its prediction from the
    other observations.

    Args:
        observations: at least four observations.
        gpu: the device of the observations.
        base: the calibration from single operations, without overheads.
    """
    rows = np.array([list(_terms(one, gpu, base)) for one in observations])
    measured = np.array([one.seconds for one in observations])
    errors = []
    for index in range(len(observations)):
        others = np.arange(len(observations)) != index
        predicted = rows[index] @ _least_squares(rows[others], measured[others])
        errors.append(float(predicted / measured[index] - 1))
    slowdown, microbatch, step = _least_squares(rows, measured).tolist()
    noise = statistics.median(one.spread for one in observations)
    fitted = replace(
        base,
        matmul_efficiency=base.matmul_efficiency / slowdown,
        fp8_matmul_efficiency=base.fp8_matmul_efficiency / slowdown,
        attention_efficiency=base.attention_efficiency / slowdown,
        memory_efficiency=base.memory_efficiency / slowdown,
        microbatch_overhead_seconds=microbatch,
        step_overhead_seconds=step,
        relative_error=max(math.sqrt(float(np.mean(np.square(errors)))), noise),
    )
    return fitted, errors


def _terms(one: Observation, gpu: Gpu, base: Calibration) -> Iterator[float]:
    """Yield the seconds without overheads, the number of microbatches in all passes, and the number of steps."""
    step = predict_step(one.config, Cluster(gpu, 1, 1), one.workload, base)
    training = one.config.training
    yield step.total
    yield training.global_batch_size / training.micro_batch_size * (2 if step.reference else 1)
    yield 1.0


def _least_squares(rows: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Return the coefficients with the least relative errors, none of them negative.

    It tries each choice of coefficients that are 0. The coefficient of computation never is.
    """
    scaled, best, least = rows / measured[:, None], np.array([1.0, 0.0, 0.0]), math.inf
    for columns in ([0], [0, 1], [0, 2], [0, 1, 2]):
        some, *_ = np.linalg.lstsq(scaled[:, columns], np.ones(len(measured)), rcond=None)
        error = float(np.sum((scaled[:, columns] @ some - 1) ** 2))
        if (some >= 0).all() and some[0] > 0 and error < least:
            best, least = np.zeros(3), error
            best[columns] = some
    return best
