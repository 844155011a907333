"""Scaling studies past 8 GPUs. Here: the settings of a sweep."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from megatron_cca.config.load import read_yaml
from megatron_cca.config.schema import PathText
from megatron_cca.errors import error_context
from megatron_cca.keys import NonNegativeInt, PositiveInt, strict
from megatron_cca.lab.studies import Keys, Name, from_plain

OPTION = "--sweep"

Mode = Literal["weak", "strong"]
Grid = Annotated[list[PositiveInt], Field(min_length=2, max_length=2)]
WorldSizes = Annotated[list[PositiveInt], Field(min_length=1)]


@strict
class LayoutSettings:
    """One entry of ``layouts``; data parallelism is what the world size leaves."""

    tensor_model_parallel_size: PositiveInt = 1
    pipeline_model_parallel_size: PositiveInt = 1
    virtual_pipeline_model_parallel_size: PositiveInt = 1
    context_parallel_size: PositiveInt = 1
    micro_batch_size: PositiveInt | None = None
    """Null means the configuration's."""


Layouts = Literal["planned"] | Annotated[list[LayoutSettings], Field(min_length=1)]


@strict
class PlannedSettings:
    """Section ``planned``: points that nobody ran, from the planner's model."""

    gpu: str
    """As ``megatron-cca plan --gpu`` names it."""
    world_sizes: WorldSizes
    config: PathText | None = None
    """A training configuration beside the sweep's file; null means the sweep's own."""
    set: Keys = dataclasses.field(default_factory=dict)
    """Keys of it to change."""
    gpus_per_node: PositiveInt | None = None
    """Null means what is usual."""
    calibration: PathText | None = None
    """What ``megatron-cca plan calibrate`` wrote, beside the sweep's file."""
    layouts: Layouts = "planned"
    """``planned`` takes the fastest that fits, at every world size anew."""
    samples_per_gpu: PositiveInt | None = None
    """Null means the sweep's, as for the keys below."""
    global_batch_size: PositiveInt | None = None
    image_grid: Grid | None = None
    caption_tokens: NonNegativeInt | None = None


@strict
class SweepSettings:
    """A whole sweep."""

    name: Name
    """For titles."""
    config: PathText
    """A training configuration, beside the sweep's file."""
    set: Keys = dataclasses.field(default_factory=dict)
    """Keys of it to change."""
    mode: Literal["weak", "strong", "both"] = "both"
    """``weak``: the global batch grows with the GPUs. ``strong``: it stays."""
    world_sizes: Literal["auto"] | WorldSizes = "auto"
    """Processes of a job, one a GPU or, on a CPU, one a core. ``auto``: 1, 2, 4, ... as far as this machine goes."""
    layouts: Layouts = dataclasses.field(default_factory=lambda: [LayoutSettings()])
    """Each is run at every world size that it divides. ``planned`` lets the planner choose at every world size."""
    samples_per_gpu: PositiveInt = 64
    """Weak scaling: the global batch is this times the world size, whatever the layout."""
    global_batch_size: PositiveInt | None = None
    """Strong scaling; null means the configuration's ``training.global_batch_size``."""
    image_grid: Grid = dataclasses.field(default_factory=lambda: [90, 90])
    """Visual tokens of every image, height and width."""
    caption_tokens: NonNegativeInt = 128
    """Of every caption."""
    warmup_steps: PositiveInt = 3
    """At the beginning of a point, not counted."""
    steps: PositiveInt = 10
    """That are timed."""
    profiled_steps: PositiveInt = 3
    """After them, that waiting is measured in; profiling slows them, so they are not timed."""
    timeout_seconds: PositiveInt = 1800
    """Of a point, from its start."""
    oversubscribe: bool = False
    """On a CPU, allow more processes than there are cores."""
    gpu: str | None = None
    """What the GPU at hand is nearest to, for its peak; null lets it say so itself."""
    calibration: PathText | None = None
    """For ``layouts: planned``: what ``megatron-cca plan calibrate`` wrote, beside this file. A CPU needs one."""
    planned: PlannedSettings | None = None

    @property
    def modes(self) -> list[Mode]:
        """The modes as a list."""
        return ["weak", "strong"] if self.mode == "both" else [self.mode]


_SECTIONS = {"layouts": LayoutSettings, "planned": PlannedSettings}


def read_sweep(path: Path) -> SweepSettings:
    """Read a sweep's file.

    It checks only the file's own keys.

    Raises:
        UserError: an unreadable file, an unknown key, a wrong type or a value out of range, in one line.
    """
    tree = read_yaml(path, OPTION, "keys name, config, mode, world_sizes, ...", SweepSettings)
    with error_context(path):
        return from_plain(SweepSettings, tree, sections=_SECTIONS)
