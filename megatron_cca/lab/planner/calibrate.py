"""A calibration from measurements: what the device reaches by itself, then what whole steps take."""

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
from megatron_cca.lab.planner.flops import Product, products
from megatron_cca.lab.planner.hardware import CPU, DEFAULT, GPUS, Calibration, Cluster, Gpu, gpu_named, name_of_device
from megatron_cca.lab.planner.measuring import Observation, observe, short_configs
from megatron_cca.lab.planner.throughput import predict_step
from megatron_cca.lab.planner.workload import ImageShape, image_workload
from megatron_cca.models import resolve_architecture
from megatron_cca.models.initialization import Initialize, initialize_by_name
from megatron_cca.training.kernel_checks import check_devices
from megatron_cca.training.shapes import rows_per_sample

# Of every side of an FP8 product (cuBLASLt).
FP8_MULTIPLE = 16
# Tokens that single products and attention are measured with, at most.
_MOST_TOKENS = 16384
# No cache holds so much.
_LARGE_BYTES = 2**28


@dataclass(frozen=True)
class Measured:
    """A calibration and what it was fitted to.

    Attributes:
        gpu: as predictions need it.
        calibration: the fit.
        has_fp8: whether FP8 products were measured, not taken from the defaults.
        observations: the short runs.
        errors: of each, predicted from the others, as a share of what was measured.
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
    initialize: Initialize = initialize_by_name,
) -> Measured:
    """Measure the device at hand with a run's shapes. The platform must be installed.

    Args:
        config: of the run.
        images: the shape of all samples.
        gpu: what the device is, by name; None asks it.
        steps: of each short run.
        initialize: draws the short runs' weights.

    Raises:
        UserError: a GPU that nobody named and that is not known, what training refuses here.
    """
    configs = short_configs(config)
    check_devices(configs[0])
    device = _device(gpu, config, images)
    base, has_fp8 = _by_itself(config, images, device)
    with TemporaryDirectory() as folder:
        bar = tqdm(configs, desc="short runs", unit="run", disable=None)
        observations = [
            observe(one, images, steps, Path(folder) / str(index), initialize=initialize)
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
    """The processor as if it were a GPU: its peaks are what a large product and a copy of activations reach."""
    precision = config.training.precision
    flops = {one: measuring.peak_flops(_dtype(one)) for one in {"fp32", "bf16", precision} - {"fp8"}}
    memory = measuring.memory_bandwidth(_activation_bytes(config, images))
    return Gpu(CPU, measuring.host_memory_bytes(), flops, memory, memory, memory, memory, gpus_per_node=1)


def _activation_bytes(config: Config, images: ImageShape) -> int:
    """Of the widest tensor that element-wise work reads: a processor may have it in its caches."""
    tokens = config.training.micro_batch_size * rows_per_sample(config) * image_workload(config, images).seq_length
    return min(4 * tokens * resolve_architecture(config.model).ffn_hidden_size, _LARGE_BYTES)


def _dtype(precision: str) -> torch.dtype:
    return torch.float32 if precision == "fp32" else torch.bfloat16


def _by_itself(config: Config, images: ImageShape, gpu: Gpu) -> tuple[Calibration, bool]:
    """Efficiencies of products, attention and memory at the run's shapes, nothing else going on; whether FP8's, too."""
    architecture, workload = resolve_architecture(config.model), image_workload(config, images)
    precision = "fp32" if config.training.precision == "fp32" else "bf16"
    rows = config.training.micro_batch_size * rows_per_sample(config)
    rows = max(1, min(rows, _MOST_TOKENS // workload.seq_length))
    tokens, dtype = rows * workload.seq_length, _dtype(precision)
    shapes = products(architecture)
    seconds = measuring.products_seconds(shapes, tokens, dtype)
    matmul = _ideal_seconds(shapes, tokens, gpu, precision) / seconds
    heads = architecture.num_attention_heads
    attention = measuring.attention_seconds(rows, heads, workload.seq_length, architecture.kv_channels, dtype)
    attention_flops = rows * 2.0 * workload.seq_length**2 * architecture.hidden_size
    fp8 = measured_fp8(shapes, tokens, gpu)
    found = replace(
        DEFAULT,
        matmul_efficiency=matmul,
        # Where FP8 products cannot be measured they are as far from their peak as by default, beside bf16's.
        fp8_matmul_efficiency=fp8 or DEFAULT.fp8_matmul_efficiency / DEFAULT.matmul_efficiency * matmul,
        attention_efficiency=attention_flops / attention / gpu.flops[precision],
        memory_efficiency=measuring.memory_bandwidth(_activation_bytes(config, images)) / gpu.memory_bandwidth,
        # Part of what whole steps show.
        layer_launch_seconds=0.0,
        microbatch_overhead_seconds=0.0,
        step_overhead_seconds=0.0,
    )
    return found, fp8 is not None


def measured_fp8(shapes: Sequence[Product], tokens: int, gpu: Gpu) -> float | None:
    """Share of the FP8 peak that a layer's products reach; None where a GPU has none, or the widths do not suit it."""
    tokens -= tokens % FP8_MULTIPLE
    fits = tokens > 0 and all(one.inputs % FP8_MULTIPLE == one.outputs % FP8_MULTIPLE == 0 for one in shapes)
    if "fp8" not in gpu.flops or not fits:
        return None
    return _ideal_seconds(shapes, tokens, gpu, "fp8") / measuring.fp8_products_seconds(shapes, tokens)


def _ideal_seconds(shapes: Sequence[Product], tokens: int, gpu: Gpu, precision: str) -> float:
    """What the products would take at a perfect efficiency, short sides and all."""
    unit = replace(DEFAULT, matmul_efficiency=1.0, fp8_matmul_efficiency=1.0)
    return sum(
        2 * tokens * one.weights / gpu.flops[precision] / unit.matmul(precision, min(tokens, one.inputs, one.outputs))
        for one in shapes
    )


def fit(observations: Sequence[Observation], gpu: Gpu, base: Calibration) -> tuple[Calibration, list[float]]:
    """The calibration whose predictions of the observations are off least, as shares; and how far each is off.

    Three numbers are fitted: by how much all computing is slower than its parts by themselves, and the overheads of a
    microbatch and of a step. The errors are those of predictions from the other observations.

    Args:
        observations: at least four.
        gpu: they were made on.
        base: of the parts by themselves, without overheads.
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
    """Seconds by the parts alone; microbatches in all passes; steps."""
    step = predict_step(one.config, Cluster(gpu, 1, 1), one.workload, base)
    training = one.config.training
    yield step.total
    yield training.global_batch_size / training.micro_batch_size * (2 if step.reference else 1)
    yield 1.0


def _least_squares(rows: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Of relative errors, with nothing negative: the best of all choices of what is 0; computing never is."""
    scaled, best, least = rows / measured[:, None], np.array([1.0, 0.0, 0.0]), math.inf
    for columns in ([0], [0, 1], [0, 2], [0, 1, 2]):
        some, *_ = np.linalg.lstsq(scaled[:, columns], np.ones(len(measured)), rcond=None)
        error = float(np.sum((scaled[:, columns] @ some - 1) ** 2))
        if (some >= 0).all() and some[0] > 0 and error < least:
            best, least = np.zeros(3), error
            best[columns] = some
    return best
