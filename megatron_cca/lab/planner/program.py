"""What ``tools/plan.py`` does, command by command."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path

from megatron_cca.config import Config
from megatron_cca.config.load import load_config
from megatron_cca.errors import UserError
from megatron_cca.lab.planner.calibration import DEFAULT, Calibration, read_calibration
from megatron_cca.lab.planner.candidates import DEFAULT_VARIABLES, VARIABLES
from megatron_cca.lab.planner.hardware import CPU, Cluster, Gpu, gpu_named
from megatron_cca.lab.planner.options import PlanSettings
from megatron_cca.lab.planner.others import obvious_others
from megatron_cca.lab.planner.report import reserved, write_report
from megatron_cca.lab.planner.search import search
from megatron_cca.lab.planner.summary import Report, text
from megatron_cca.lab.planner.trials import Wishes
from megatron_cca.lab.planner.workload import ImageShape
from megatron_cca.models import resolve_architecture
from megatron_cca.models.grids import own_grid
from megatron_cca.training.checks import PRETRAINED, REFERENCE, check_weights

_USUAL_GRID = "90x90"


def run_search(settings: PlanSettings) -> None:
    """Search, print the table, and write the folder if there is to be one.

    Raises:
        UserError: an option that cannot be, weights of another model, a cluster that does not suit the model.
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
    """The data that ``--image-grid`` and ``--caption-tokens`` describe; the model's own grid where it has one.

    Raises:
        UserError: not of the form ``HxW``.
    """
    if grid is None:
        own = own_grid(resolve_architecture(config.model))
        grid = _USUAL_GRID if own is None else "{}x{}".format(*own)
    found = re.fullmatch(r"([1-9]\d{0,5})[x*]([1-9]\d{0,5})", grid)
    if found is None:
        raise UserError(f"--image-grid: {grid!r} is not of the form HxW, such as 90x90")
    return ImageShape(int(found[1]), int(found[2]), caption_tokens)


def check_known_weights(config: Config) -> None:
    """Refuse to plan for weights that are here and another model's; those that lie elsewhere are taken on trust.

    Raises:
        UserError: training's own line.
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
    # A processor has no data sheet here: it is what was measured.
    return (measured if settings.gpu == CPU else gpu_named(settings.gpu)), calibration


def _variables(text: str | None) -> tuple[str, ...]:
    if text is None:
        return DEFAULT_VARIABLES
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = [name for name in names if name not in VARIABLES]
    if unknown:
        raise UserError(f"--vary: {unknown[0]!r} is unknown; known: {', '.join(VARIABLES)}")
    return names
