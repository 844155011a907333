"""The planner's prediction of a run, beside what the run measured."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_cca.config import Config
from megatron_cca.data.digits import data_folders
from megatron_cca.data.manifest import read_manifest, read_table
from megatron_cca.errors import UserError
from megatron_cca.lab.planner.hardware import CPU, Calibration, Cluster, Gpu, calibrated_device, name_of_device
from megatron_cca.lab.planner.memory import GIB, predict_memory
from megatron_cca.lab.planner.program import image_shape
from megatron_cca.lab.planner.report import layout_name
from megatron_cca.lab.planner.throughput import StepTime, predict_step
from megatron_cca.lab.planner.workload import MFU_MEANS, ImageShape, Workload, image_workload, mfu
from megatron_cca.lab.run_report import ReportOptions
from megatron_cca.lab.run_report.run_folder import RunFolder
from megatron_cca.models import resolve_architecture
from megatron_cca.models.architecture import only_grid


@dataclass(frozen=True)
class Compared:
    """A quantity: predicted, measured, and how far the prediction is off, each as text."""

    name: str
    predicted: str
    measured: str
    off: str


@dataclass(frozen=True)
class Prediction:
    """Rows of the comparison, lines about what it rests on, and the step's seconds by cause."""

    rows: list[Compared]
    remarks: list[str]
    causes: dict[str, float]


def predict(run: RunFolder, options: ReportOptions) -> Prediction:
    """Predict a run's step and memory, as far as its device and its images are known.

    What is not known is said in the remarks, with the option that would tell it.

    Raises:
        UserError: an option that cannot be right, such as an unknown GPU.
    """
    if run.config is None:
        return Prediction([], [f"No prediction: {run.config_problem}."], {})
    world_size = run.beginning.get("world_size")
    if not isinstance(world_size, int):
        return Prediction([], ["No prediction: the events do not say on how many processes the run was."], {})
    try:
        shape = _shape(run.config, options)
    except _UnknownError as reason:
        return Prediction([], [f"No prediction: {reason}; name it with --image-grid."], {})
    workload = image_workload(run.config, shape)
    device, why_no_speed = _device(run, options)
    on_gpu = device is not None and device[0].name != CPU
    memory = predict_memory(run.config, world_size, workload, on_gpu=on_gpu)
    rows = [_memory_row(memory.total / GIB, run.peak_memory_gib, on_gpu=on_gpu)]
    remarks = [_about(run.config, world_size, shape, workload)]
    if device is None:
        return Prediction(rows, [*remarks, why_no_speed], {})
    gpu, calibration = device
    per_node = options.gpus_per_node or gpu.gpus_per_node
    step = predict_step(run.config, Cluster(gpu, world_size, per_node), workload, calibration)
    rows = [*_speed_rows(step, run), *rows]
    by = "its calibration" if options.calibration is not None else "its data sheet and published runs"
    remarks.append(f"Speed is predicted for {gpu.name} by {by}, give or take {step.error:.0%}.")
    remarks.append(MFU_MEANS)
    return Prediction(rows, remarks, {name: value for name, value in step.parts.items() if value > 0})


class _UnknownError(Exception):
    """The prediction lacks something; the text says what."""


def _shape(config: Config, options: ReportOptions) -> ImageShape:
    if options.image_grid is not None:
        return image_shape(config, options.image_grid, options.caption_tokens or 0)
    own = only_grid(resolve_architecture(config.model))
    grids, captions = [own] if own is not None else [], [0]
    for folder in data_folders(config, make=False):
        try:
            table = read_table(folder, read_manifest(folder)["num_samples"])
        except UserError as error:
            if own is None:
                raise _UnknownError(f"the grid of its images is not known ({error})") from None
            continue
        # A clip's frames lie below each other: they are as many codes.
        frames, height, width = table["grid"][int(np.argmax(table["grid"].prod(axis=1)))].tolist()
        grids.append((frames * height, width))
        captions.append(int(table["caption_length"].max()))
    if not grids:
        raise _UnknownError("the grid of its images is not known")
    height, width = own or max(grids, key=lambda grid: grid[0] * grid[1])
    longest = max(captions) if options.caption_tokens is None else options.caption_tokens
    return ImageShape(height, width, longest)


def _device(run: RunFolder, options: ReportOptions) -> tuple[tuple[Gpu, Calibration] | None, str]:
    """Return the device with its calibration, or None and why there is none."""
    called = str(run.beginning.get("device", ""))
    name = options.gpu or name_of_device(called) or (CPU if options.calibration is not None else None)
    if name is None:
        return None, (
            f"Speed is not predicted: {called or 'the device'} is not in the planner's table; name a GPU with --gpu, "
            "or measure the device with megatron-cca plan calibrate and give --calibration."
        )
    return calibrated_device(name, options.calibration), ""


def _about(config: Config, world_size: int, shape: ImageShape, workload: Workload) -> str:
    return (
        f"{layout_name(config, world_size)}, rows of {workload.seq_length:,} tokens: images of {shape.height} x "
        f"{shape.width} codes, captions of up to {shape.caption_tokens} tokens."
    )


def _memory_row(predicted: float, measured: float | None, *, on_gpu: bool) -> Compared:
    # On a CPU the process holds its libraries, too, of which the planner knows nothing.
    name = "memory of the fullest rank, GiB" if on_gpu else "memory of the fullest rank's tensors, GiB"
    shown = "–" if measured is None else f"{measured:.2f}"
    if measured is not None and not on_gpu:
        return Compared(name, f"{predicted:.2f}", f"{shown} (the process, with its libraries)", "")
    return Compared(name, f"{predicted:.2f}", f"{shown} (rank 0)", _off(predicted, measured))


def _speed_rows(step: StepTime, run: RunFolder) -> Iterator[Compared]:
    seconds = run.seconds_a_step
    if seconds is None:
        seconds = math.nan
    reached = mfu(step.model_flops_per_gpu, seconds, step.peak_flops)
    for name, predicted, measured, form in (
        ("seconds a step", step.total, seconds, "{:.3g}"),
        ("samples a second", step.samples_per_second, step.samples / seconds, "{:.3g}"),
        ("MFU", step.mfu, reached, "{:.2%}"),
    ):
        shown = "–" if math.isnan(measured) else form.format(measured)
        yield Compared(name, form.format(predicted), shown, _off(predicted, measured))


def _off(predicted: float, measured: float | None) -> str:
    return "" if measured is None or math.isnan(measured) else f"{predicted / measured - 1:+.0%}"
