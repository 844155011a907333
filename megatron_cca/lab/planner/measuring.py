"""Measurements on this device: products, attention and memory alone, and real steps of short runs.

A short run trains a model with fewer layers on random tokens.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from megatron_cca import platform
from megatron_cca.config import Config
from megatron_cca.data.shard_writing import Sample, write_shards
from megatron_cca.lab.planner.candidates import Layout, laid_out, without_files
from megatron_cca.lab.planner.random_weights import draw_everything
from megatron_cca.lab.planner.workload import ImageShape, Product, Workload, attention_pieces, image_workload
from megatron_cca.models import resolve_architecture
from megatron_cca.models.architecture import Architecture
from megatron_cca.models.initialization import Initialize
from megatron_cca.parallel.ranks import initialize_distributed
from megatron_cca.training.batches import open_data
from megatron_cca.training.setup import Run, set_up
from megatron_cca.training.step import StepReport, train_step

# The least duration of a measurement in seconds, and its least number of repetitions.
_ENOUGH_SECONDS = 0.2
_ENOUGH_REPEATS = 20
# A bound that no run reaches. The gate does not concern random weights.
_NO_GATE = 1e9


def seconds_of(work: Callable[[], object]) -> float:
    """Return the seconds of the fastest of many repetitions, after one that does not count.

    Other work on the machine can only add time.
    """
    work()
    platform.synchronize()
    found: list[float] = []
    while sum(found) < _ENOUGH_SECONDS or len(found) < _ENOUGH_REPEATS:
        started = time.perf_counter()
        work()
        platform.synchronize()
        found.append(time.perf_counter() - started)
    return min(found)


def peak_flops(dtype: torch.dtype, side: int = 1024) -> float:
    """Return the FLOP/s of a large product.

    It replaces the data sheet of a device that has none.
    """
    left, right = (torch.randn(side, side, device=platform.device()).to(dtype) for _ in range(2))
    return 2 * side**3 / seconds_of(lambda: left @ right)


def products_seconds(products: Sequence[Product], tokens: int, dtype: torch.dtype) -> float:
    """Return the seconds of a layer's projections for ``tokens`` tokens, one after another."""
    total = 0.0
    for product in products:
        inputs = torch.randn(tokens, product.inputs, device=platform.device()).to(dtype)
        weight = torch.randn(product.outputs, product.inputs, device=platform.device()).to(dtype)
        total += seconds_of(lambda inputs=inputs, weight=weight: inputs @ weight.t())
    return total


def fp8_products_seconds(products: Sequence[Product], tokens: int) -> float:
    """Return :func:`products_seconds` in FP8 E4M3.

    Each tensor has one scale. The output is bf16. The conversion of the factors to FP8 does not count.

    Args:
        products: projections whose sides are all multiples of 16.
        tokens: number of tokens, a multiple of 16.
    """
    device, scale = platform.device(), torch.ones((), device=platform.device())
    total = 0.0
    for product in products:
        inputs = torch.randn(tokens, product.inputs, device=device).to(torch.float8_e4m3fn)
        weight = torch.randn(product.outputs, product.inputs, device=device).to(torch.float8_e4m3fn)
        total += seconds_of(
            lambda inputs=inputs, weight=weight: torch._scaled_mm(
                inputs, weight.t(), scale_a=scale, scale_b=scale, out_dtype=torch.bfloat16
            )
        )
    return total


def attention_seconds(rows: int, architecture: Architecture, seq_length: int, dtype: torch.dtype) -> float:
    """Return the seconds of the forward of a layer's attention, call by call. A single call is causal."""
    heads, channels = architecture.num_attention_heads, architecture.kv_channels
    shape = (rows, heads, seq_length, channels)
    query, key, value = (torch.randn(shape, device=platform.device()).to(dtype) for _ in range(3))
    pieces, is_causal = attention_pieces(architecture, seq_length), not architecture.scales

    def attend() -> None:
        for queries, keys in pieces:
            seen = (query[:, :, keys - queries : keys], key[:, :, :keys], value[:, :, :keys])
            scaled_dot_product_attention(*seen, is_causal=is_causal)

    return seconds_of(attend)


def memory_bandwidth(num_bytes: int) -> float:
    """Return the bytes/s of a copy.

    Bytes read and bytes written both count.
    """
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=platform.device())
    target = torch.empty_like(source)
    return 2 * num_bytes / seconds_of(lambda: target.copy_(source))


def host_memory_bytes() -> int:
    """Return the bytes of the machine's host memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@dataclass(frozen=True)
class Observation:
    """The measurement of a short run.

    Attributes:
        config: configuration of the short run.
        workload: the rows of a microbatch.
        seconds: time of the fastest step; other work on the machine can only add time.
        spread: by how much the median step was slower, as a share.
    """

    config: Config
    workload: Workload
    seconds: float
    spread: float


def short_configs(config: Config) -> list[Config]:
    """Return runs on one device that differ in layers, microbatches and recomputation."""
    whole = resolve_architecture(config.model).num_layers
    few, more = max(1, min(2, whole // 2)), min(4, whole)
    micro = config.training.micro_batch_size
    alone = without_extras(laid_out(config, Layout(micro_batch=micro)))
    return [
        replace(
            alone,
            model=replace(alone.model, num_layers=layers),
            training=replace(alone.training, global_batch_size=micro * microbatches, recompute_granularity=recompute),
        )
        for layers, microbatches, recompute in (
            (few, 1, None),
            (more, 1, None),
            (few, 2, None),
            (more, 2, None),
            (more, 1, "full"),
        )
    ]


def measure_short_run(
    config: Config,
    images: ImageShape,
    steps: int,
    folder: Path,
    *,
    initialize: Initialize = draw_everything,
) -> Observation:
    """Train ``steps`` steps and measure them, after one step that does not count.

    Args:
        config: a configuration from :func:`short_configs`.
        images: the shape of all samples.
        steps: number of measured steps.
        folder: folder for the shards and the run's output; must not exist.
        initialize: draws the weights.

    Raises:
        UserError: training refuses the run on this device.
    """
    workload = image_workload(config, images)
    write_random_shards(config, images, folder)
    config = on_random_shards(config, folder, steps + 1)
    initialize_distributed(config)
    with started(config, initialize=initialize) as run:
        seconds = [timed_step(run)[0] for _ in range(steps + 1)]
    fastest = min(seconds[1:])
    return Observation(config, workload, fastest, statistics.median(seconds[1:]) / fastest - 1)


def without_extras(config: Config) -> Config:
    """Return a configuration with the same steps and nothing else.

    It reads no weights and has no checkpoints, no validation and no gate.
    """
    config = without_files(config)
    return replace(
        config,
        training=replace(config.training, save_interval=0),
        validation=replace(config.validation, interval=0, fraction=0.0, path=None),
        reference=replace(config.reference, allow_bias=_NO_GATE),
    )


def measurable(config: Config) -> Config:
    """Return :func:`without_extras`, with the run's own reference strategy.

    The reference has random weights.
    """
    bare = without_extras(config)
    return replace(bare, reference=replace(bare.reference, strategy=config.reference.strategy))


def write_random_shards(config: Config, images: ImageShape, folder: Path) -> None:
    """Write ``<folder>/shards``: two global batches of random tokens, always the same ones."""
    vocabulary = resolve_architecture(config.model).vocabulary
    write_shards(folder / "shards", _samples(config, images), vocabulary, lambda text: [ord(c) % 256 for c in text])


def on_random_shards(config: Config, folder: Path, steps: int) -> Config:
    """Return the run on the shards of :func:`write_random_shards`, with ``steps`` steps.

    Its output folder is ``<folder>/run``.
    """
    return replace(
        config,
        data=replace(config.data, path=str(folder / "shards"), condition_dropout=0.0, length_bucketing=1),
        training=replace(config.training, output_dir=str(folder / "run"), train_iters=steps),
    )


def timed_step(run: Run) -> tuple[float, StepReport]:
    """Take a step; return its seconds and its report. Collective over all ranks.

    The time ends when the device has finished.
    """
    start = time.perf_counter()
    report = train_step(run)
    platform.synchronize()
    return time.perf_counter() - start, report


def _samples(config: Config, images: ImageShape) -> list[Sample]:
    vocabulary, random = resolve_architecture(config.model).vocabulary, np.random.default_rng(0)
    caption_tokens = images.caption_tokens if vocabulary.num_classes is None else 1
    return [
        Sample(
            random.integers(vocabulary.codebook_size, size=(images.height, images.width)),
            random.integers(vocabulary.caption_size, size=caption_tokens),
        )
        for _ in range(2 * config.training.global_batch_size)
    ]


def started(config: Config, *, initialize: Initialize = draw_everything) -> Run:
    """Set up the run for its first step, for use in a ``with``. Collective over all ranks."""
    return set_up(config, open_data(config), initialize=initialize)
