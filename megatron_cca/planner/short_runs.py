"""Real training steps of a model with fewer layers, on random tokens, timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_cca import platform
from megatron_cca.config import Config
from megatron_cca.data.shards import write_shards
from megatron_cca.data.token_files import Sample
from megatron_cca.models import resolve_architecture
from megatron_cca.parallel.process_groups import initialize_distributed
from megatron_cca.planner.candidates import Layout, laid_out, without_files
from megatron_cca.planner.workload import ImageShape, Workload, image_workload
from megatron_cca.training.batches import open_data
from megatron_cca.training.setup import set_up
from megatron_cca.training.step import train_step

# A bound that no run reaches: random weights are not what the gate is for.
_NO_GATE = 1e9


@dataclass(frozen=True)
class Observation:
    """A short run.

    Attributes:
        config: of it.
        workload: its rows.
        seconds: of its fastest step: what else the machine does only adds.
        spread: by how much the median step was slower, as a share.
    """

    config: Config
    workload: Workload
    seconds: float
    spread: float


def short_configs(config: Config) -> list[Config]:
    """Runs on one device that differ in layers, microbatches and recomputation."""
    whole = resolve_architecture(config.model).num_layers
    few, more = max(1, min(2, whole // 2)), min(4, whole)
    micro = config.training.micro_batch_size
    alone = without_files(laid_out(config, Layout(micro_batch=micro)))
    return [
        replace(
            alone,
            model=replace(alone.model, num_layers=layers),
            training=replace(
                alone.training, global_batch_size=micro * microbatches, recompute_granularity=recompute, save_interval=0
            ),
            validation=replace(alone.validation, interval=0, fraction=0.0, path=None),
            reference=replace(alone.reference, allow_bias=_NO_GATE),
        )
        for layers, microbatches, recompute in (
            (few, 1, None),
            (more, 1, None),
            (few, 2, None),
            (more, 2, None),
            (more, 1, "full"),
        )
    ]


def observe(config: Config, images: ImageShape, steps: int, folder: Path) -> Observation:
    """Train so many steps, after one that is not timed.

    Args:
        config: from :func:`short_configs`.
        images: the shape of all samples.
        steps: that are timed.
        folder: for shards and what a run writes; must not exist.

    Raises:
        UserError: what training refuses on this device.
    """
    architecture, workload = resolve_architecture(config.model), image_workload(config, images)
    samples = _samples(config, images)
    write_shards(folder / "shards", samples, architecture.vocabulary, lambda text: [ord(c) % 256 for c in text])
    config = replace(
        config,
        data=replace(config.data, path=str(folder / "shards"), condition_dropout=0.0, length_bucketing=1),
        training=replace(config.training, output_dir=str(folder / "run"), train_iters=steps + 1),
    )
    initialize_distributed(config)
    with _started(config) as run:
        seconds = []
        for _ in range(steps + 1):
            started = time.perf_counter()
            train_step(run)
            platform.synchronize()
            seconds.append(time.perf_counter() - started)
    fastest = min(seconds[1:])
    return Observation(config, workload, fastest, statistics.median(seconds[1:]) / fastest - 1)


def _samples(config: Config, images: ImageShape) -> list[Sample]:
    vocabulary, random = resolve_architecture(config.model).vocabulary, np.random.default_rng(0)
    return [
        Sample(
            random.integers(vocabulary.codebook_size, size=(images.height, images.width)),
            random.integers(vocabulary.text_size, size=images.caption_tokens),
        )
        for _ in range(2 * config.training.global_batch_size)
    ]


@contextmanager
def _started(config: Config) -> Iterator:
    run = set_up(config, open_data(config))
    try:
        yield run
    finally:
        run.loader.close()
