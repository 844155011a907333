"""The commands ``search`` and ``calibrate`` of ``tools/plan.py``; ``dry_run_program.py`` has ``dry-run``."""

from __future__ import annotations

import re
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_cca import __version__, platform
from megatron_cca.config import Config
from megatron_cca.config.load import load_config
from megatron_cca.errors import UserError
from megatron_cca.io.outputs import check_file, file_system_errors, write_text
from megatron_cca.lab.planner.candidates import DEFAULT_VARIABLES, VARIABLES, Wishes
from megatron_cca.lab.planner.hardware import (
    CPU,
    DEFAULT,
    Calibration,
    Cluster,
    Gpu,
    calibration_json,
    gpu_named,
    read_calibration,
)
from megatron_cca.lab.planner.options import CalibrateSettings, PlanSettings
from megatron_cca.lab.planner.report import Report, reserved, text, write_report
from megatron_cca.lab.planner.search import obvious_others, search
from megatron_cca.lab.planner.workload import ImageShape, image_workload
from megatron_cca.models import resolve_architecture
from megatron_cca.models.architecture import only_grid
from megatron_cca.training.checks import PRETRAINED, REFERENCE, check_weights
from megatron_cca.version import installed_versions

if TYPE_CHECKING:
    from megatron_cca.lab.planner.calibrate import Measured


_USUAL_GRID = "90x90"


def run_search(settings: PlanSettings) -> None:
    """Search, print the table, and write the folder if the settings name one.

    Raises:
        UserError: an invalid option, weights of another model, or a cluster that does not suit the model.
    """
    config = load_config(settings.config, settings.overrides)
    wishes = _wishes(settings, config)
    check_known_weights(config)
    with reserved(settings.output, overwrite=settings.overwrite) if settings.output else nullcontext():
        plan = search(config, wishes, settings.top)
        report = Report(plan, config, obvious_others(plan.best[0], wishes))
        print(text(report))
        if settings.output:
            print(f"\nwrote {', '.join(write_report(settings.output, report))} to {settings.output}")


def image_shape(config: Config, grid: str | None, caption_tokens: int) -> ImageShape:
    """Return the image shape that ``--image-grid`` and ``--caption-tokens`` describe.

    Without a grid, it is the model's own grid if it has one.

    Raises:
        UserError: the grid is not of the form ``HxW``.
    """
    if grid is None:
        own = only_grid(resolve_architecture(config.model))
        grid = _USUAL_GRID if own is None else "{}x{}".format(*own)
    found = re.fullmatch(r"([1-9]\d{0,5})[x*]([1-9]\d{0,5})", grid)
    if found is None:
        raise UserError(f"--image-grid: {grid!r} is not of the form HxW, such as 90x90")
    return ImageShape(int(found[1]), int(found[2]), caption_tokens)


def check_known_weights(config: Config) -> None:
    """Refuse weights on this machine that belong to another model.

    Weights on other machines are not checked.

    Raises:
        UserError: the weights belong to another model; the message is that of training.
    """
    for key, path in ((PRETRAINED, config.training.pretrained_checkpoint), (REFERENCE, config.reference.checkpoint)):
        if path is not None and Path(path).exists():
            check_weights(config, path, key)


def _wishes(settings: PlanSettings, config: Config) -> Wishes:
    gpu, calibration = _device(settings)
    per_node = gpu.gpus_per_node if settings.gpus_per_node is None else settings.gpus_per_node
    shape = image_shape(config, settings.image_grid, settings.caption_tokens)
    return Wishes(Cluster(gpu, settings.gpus, per_node), shape, _variables(settings.vary), calibration)


def _device(settings: PlanSettings) -> tuple[Gpu, Calibration]:
    if settings.calibration is None:
        return gpu_named(settings.gpu), DEFAULT
    calibration, measured = read_calibration(settings.calibration, settings.gpu)
    # The project has no data sheet of a processor. Its measurement replaces one.
    return (measured if settings.gpu == CPU else gpu_named(settings.gpu)), calibration


def _variables(text: str | None) -> tuple[str, ...]:
    if text is None:
        return DEFAULT_VARIABLES
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = [name for name in names if name not in VARIABLES]
    if unknown:
        raise UserError(f"--vary: {unknown[0]!r} is unknown; known: {', '.join(VARIABLES)}")
    return names


# Packages whose versions change the times.
PACKAGES = ("torch", "megatron-core", "transformer-engine")


def run_calibrate(settings: CalibrateSettings) -> None:
    """Measure the device, write the file, and print the result.

    Raises:
        UserError: an invalid option, a run that training refuses on this device, or an existing file.
    """
    config = load_config(settings.config, settings.overrides)
    images = image_shape(config, settings.image_grid, settings.caption_tokens)
    # Called for its refusals. The measurement of the processor alone can take a minute.
    image_workload(config, images)
    check_file(settings.output, overwrite=settings.overwrite)
    platform.install_option(settings.device)
    # Imported late: Megatron-Core must not be imported before the platform is installed.
    from megatron_cca.lab.planner.calibrate import calibrate

    found = calibrate(config, images, settings.gpu, settings.steps)
    about = {
        "version": __version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device_name": platform.device_name(),
        "packages": installed_versions(PACKAGES),
        "not_measured": _not_measured(found),
        "runs": [
            {
                "layers": one.config.model.num_layers,
                "global_batch_size": one.config.training.global_batch_size,
                "recompute": one.config.training.recompute_granularity,
                "seconds": one.seconds,
                "spread": one.spread,
                "error": error,
            }
            for one, error in zip(found.observations, found.errors, strict=True)
        ],
    }
    with file_system_errors(settings.output):
        write_text(settings.output, calibration_json(found.calibration, found.gpu, **about))
    print(f"{_summary(found)}\nwrote {settings.output}")


def _not_measured(measured: Measured) -> str:
    products = "" if measured.has_fp8 else ", FP8 products"
    return f"NVLink, network, host bandwidth, overlaps{products}: the defaults"


def _fp8_words(measured: Measured) -> str:
    if measured.has_fp8:
        return f"those in FP8 {measured.calibration.fp8_matmul_efficiency:.0%} of theirs"
    if "fp8" not in measured.gpu.flops:
        return "there are none in FP8 here"
    return "those in FP8 were not measured, whose widths must be multiples of 16"


def _summary(measured: Measured) -> str:
    found = measured.calibration
    return (
        f"{platform.device_name()} as {found.gpu}: products reach {found.matmul_efficiency:.0%} of the peak, "
        f"{_fp8_words(measured)}, attention {found.attention_efficiency:.0%}, memory {found.memory_efficiency:.0%}; a "
        f"microbatch costs {found.microbatch_overhead_seconds * 1e3:.1f} ms besides, a step "
        f"{found.step_overhead_seconds * 1e3:.1f}.\n"
        f"Short runs predicted from the others are off by {found.relative_error:.0%} (root mean square). Links between "
        "GPUs were not measured."
    )
