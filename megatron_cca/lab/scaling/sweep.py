"""A sweep over numbers of nodes: its points, what each has to be, and the files of those that are done."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_cca import platform
from megatron_cca.config import Config
from megatron_cca.config.load import config_from_dict, config_to_dict, load_config
from megatron_cca.errors import UserError, error_context, one_line, shortened
from megatron_cca.io.file_contents import json_object
from megatron_cca.io.outputs import write_json, write_text
from megatron_cca.lab.planner.workload import ImageShape
from megatron_cca.lab.scaling import OPTION, Keys, Layouts, LayoutSettings, Mode, SweepSettings, read_sweep
from megatron_cca.lab.studies.tasks import FAILED, FINISHED, digest
from megatron_cca.models import explicit
from megatron_cca.objectives.base import inherited
from megatron_cca.version import code_version

MEASURED, PLANNED = "measured", "planned"
RESULTS, TABLE, PLOT = "results.jsonl", "table.md", "scaling.png"
FOLDER, LOGS = "points", "logs"
_REASON_LENGTH = 300
_NUMBERS = ("tokens_per_second_per_gpu", "low", "high", "mfu", "memory_gib", "communication", "bubble", "ideal_bubble")
Record = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """One world size on one layout in one mode.

    Attributes:
        kind: :data:`MEASURED` or :data:`PLANNED`.
        mode: weak or strong.
        num_gpus: number of processes.
        config: the configuration with the point's global batch size, before its layout.
        layout: the layout; None lets the planner choose.
        images: the shape of the images.
        how: all other inputs of the result, as plain data.
    """

    kind: str
    mode: Mode
    num_gpus: int
    config: Config
    layout: LayoutSettings | None
    images: ImageShape
    how: dict[str, Any] = field(hash=False)

    @property
    def series(self) -> str:
        """Its layout without data parallelism, such as ``PP 2``.

        A line joins the points of a series.
        """
        if self.layout is None:
            return "planner's layout"
        sizes = {
            "TP": self.layout.tensor_model_parallel_size,
            "PP": self.layout.pipeline_model_parallel_size,
            "VPP": self.layout.virtual_pipeline_model_parallel_size,
            "CP": self.layout.context_parallel_size,
        }
        return " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "DP"

    @property
    def title(self) -> str:
        """Its name in messages and on a command line."""
        return f"{self.mode}-{self.num_gpus}-{self.series.replace(' ', '').replace(chr(39), '').lower()}"

    @cached_property
    def key(self) -> str:
        """Key of all inputs of the result.

        The mode is not among them. The same global batch size in both modes is the same point.
        """
        contents = {
            "kind": self.kind,
            "num_gpus": self.num_gpus,
            "config": config_to_dict(explicit(self.config)),
            "layout": None if self.layout is None else asdict(self.layout),
            "images": asdict(self.images),
            "how": self.how,
        }
        return f"{self.kind}-{self.num_gpus}-{digest(contents)}"


@dataclass(frozen=True)
class Sweep:
    """A sweep's file and its points.

    Attributes:
        path: the file.
        settings: the settings in the file.
        measured, planned: the points.
    """

    path: Path
    settings: SweepSettings
    measured: list[Point]
    planned: list[Point]


def open_sweep(path: Path, device: platform.DeviceChoice, *, is_elsewhere: bool) -> Sweep:
    """Read a sweep and create its points.

    Args:
        path: the sweep's file.
        device: auto, cpu or cuda.
        is_elsewhere: whether the points run on other machines, whose launcher sets the number of processes.

    Raises:
        UserError: see :func:`read_sweep`; a configuration that cannot be read, more processes than this machine has
            room for, or layouts that divide no world size.
    """
    settings = read_sweep(path)
    with error_context(path):
        config = _config(path, settings.config, settings.set, "config")
        planned = [] if settings.planned is None else _planned(path, settings, config)
        sizes = _world_sizes(settings, device, is_elsewhere=is_elsewhere)
        how = {
            **{name: getattr(settings, name) for name in ("warmup_steps", "steps", "profiled_steps", "gpu")},
            "calibration": _calibration(path, settings.calibration, "calibration"),
        }
        batches = settings.samples_per_gpu, settings.global_batch_size or config.training.global_batch_size
        images = ImageShape(*settings.image_grid, settings.caption_tokens)
        measured = [
            Point(MEASURED, mode, size, _with_batch(config, mode, size, *batches), layout, images, how)
            for mode in settings.modes
            for layout in _layouts(settings.layouts)
            for size in sizes
            if _divides(layout, size)
        ]
        if not measured:
            raise UserError(f"layouts: none of them divides a world size of {', '.join(map(str, sizes))}")
    return Sweep(path, settings, measured, planned)


def _room(device: platform.DeviceChoice) -> tuple[str, int]:
    try:
        return platform.num_devices(device)
    except ValueError as error:
        raise UserError(f"--device: {error}") from None


def _world_sizes(settings: SweepSettings, device: platform.DeviceChoice, *, is_elsewhere: bool) -> list[int]:
    kind, room = _room(device)
    if settings.world_sizes == "auto":
        return [1 << power for power in range(room.bit_length())]
    sizes = sorted(set(settings.world_sizes))
    if is_elsewhere or sizes[-1] <= room or (kind == "cpu" and settings.oversubscribe):
        return sizes
    what, advice = ("cores", ", or set oversubscribe") if kind == "cpu" else ("GPUs", "")
    raise UserError(
        f"world_sizes: {sizes[-1]} is more than the {room} {what} of this machine; leave it out{advice}, or start its "
        "points on a cluster (run.py list)"
    )


def _planned(path: Path, settings: SweepSettings, config: Config) -> list[Point]:
    section = settings.planned
    own = section.config is None
    base = config if own and not section.set else _planned_config(path, settings)
    images = ImageShape(
        *(section.image_grid or settings.image_grid),
        settings.caption_tokens if section.caption_tokens is None else section.caption_tokens,
    )
    batches = (
        section.samples_per_gpu or settings.samples_per_gpu,
        section.global_batch_size or (own and settings.global_batch_size) or base.training.global_batch_size,
    )
    how = {
        "gpu": section.gpu,
        "gpus_per_node": section.gpus_per_node,
        "calibration": _calibration(path, section.calibration, "planned.calibration"),
        # The planner's formulas may change with the code. A new plan takes only seconds.
        "code": code_version(),
    }
    return [
        Point(PLANNED, mode, size, _with_batch(base, mode, size, *batches), layout, images, how)
        for mode in settings.modes
        for layout in _layouts(section.layouts)
        for size in sorted(set(section.world_sizes))
        if _divides(layout, size)
    ]


def _planned_config(path: Path, settings: SweepSettings) -> Config:
    section = settings.planned
    keys = section.set if section.config is not None else {**settings.set, **section.set}
    return _config(path, section.config or settings.config, keys, "planned.config")


def _config(path: Path, name: str, keys: Keys, key: str) -> Config:
    file = path.parent / name
    if not file.is_file():
        raise UserError(f"{key}: {file} is not there; name a training configuration beside the sweep's file")
    config = load_config(file)
    tree = config_to_dict(config)
    if "objective.name" in keys:
        tree["objective"] = inherited(tree["objective"], keys["objective.name"])
    for dotted, value in keys.items():
        section, dot, option = dotted.partition(".")
        if not (dot and option) or section not in tree:
            raise UserError(f"set: {dotted} is not of the form section.key, such as training.micro_batch_size")
        tree[section][option] = value
    with error_context("set"):
        return config_from_dict(tree, typed=True)


def _calibration(path: Path, name: str | None, key: str) -> str | None:
    """Return the calibration's path and contents.

    Another measurement therefore gives another key.
    """
    if name is None:
        return None
    file = path.parent / name
    try:
        return f"{file}\n{file.read_text(encoding='utf-8')}"
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}: {file}: {getattr(error, 'strerror', None) or error}") from None


def _layouts(layouts: Layouts) -> list[LayoutSettings | None]:
    return [None] if layouts == "planned" else list(layouts)


def _divides(layout: LayoutSettings | None, size: int) -> bool:
    if layout is None:
        return True
    unit = layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size * layout.context_parallel_size
    return size % unit == 0


def _with_batch(config: Config, mode: Mode, size: int, per_gpu: int, whole: int) -> Config:
    batch = per_gpu * size if mode == "weak" else whole
    return replace(config, training=replace(config.training, global_batch_size=batch))


def point_named(sweep: Sweep, title: str | None, world_size: int) -> Point:
    """Return the measured point of this name; without a name, the only one of this world size.

    Raises:
        UserError: no such point, or several ones.
    """
    found = [point for point in sweep.measured if title in (None, point.title)]
    if title is None:
        found = [point for point in found if point.num_gpus == world_size]
    if len({point.key for point in found}) == 1:
        return found[0]
    names = ", ".join(point.title for point in (found or sweep.measured))
    if not found:
        raise UserError(f"--point: {title or f'none of {world_size} processes'}: {OPTION} {sweep.path} has {names}")
    raise UserError(f"--point: is missing; of {world_size} processes {OPTION} {sweep.path} has {names}")


@dataclass(frozen=True)
class PointRecord:
    """A point and its record."""

    point: Point
    record: Record

    @property
    def is_finished(self) -> bool:
        """Whether the record has numbers."""
        return self.record["status"] == FINISHED


def record_path(output: Path, point: Point) -> Path:
    """Return the path of a point's record."""
    return output / FOLDER / f"{point.key}.json"


def read_record(output: Path, point: Point) -> Record | None:
    """Read a point's record; return None before the point has ended.

    Raises:
        UserError: the file is damaged; names it.
    """
    path = record_path(output, point)
    if not path.is_file():
        return None
    record = json_object(path)
    is_whole = record.get("status") == FINISHED and all(type(record.get(one)) in (int, float) for one in _NUMBERS)
    is_told = record.get("status") == FAILED and isinstance(record.get("reason"), str)
    if not (is_whole or is_told):
        raise UserError(f"{path} is damaged: it holds no point of a sweep; delete it to run the point again")
    return record


def write_finished(output: Path, point: Point, found: Record) -> None:
    """Write the result of a point.

    The file is complete or does not exist.
    """
    _write(output, point, {"status": FINISHED, **found})


def write_failed(output: Path, point: Point, reason: str) -> None:
    """Write why a point has no numbers.

    An existing record stays.
    """
    if not record_path(output, point).exists():
        _write(
            output, point, {"status": FAILED, "reason": shortened(one_line(" ".join(reason.split())), _REASON_LENGTH)}
        )


def _write(output: Path, point: Point, record: Record) -> None:
    write_json(record_path(output, point), {"key": point.key, "kind": point.kind, "num_gpus": point.num_gpus, **record})


def forget_failed(output: Path, points: Sequence[Point]) -> None:
    """Delete the records of failed points, so that these run again."""
    for point in points:
        record = read_record(output, point)
        if record is not None and record["status"] == FAILED:
            record_path(output, point).unlink()


def rows_of(output: Path, points: Sequence[Point]) -> list[PointRecord]:
    """Return the points that have ended, in order."""
    found = [(point, read_record(output, point)) for point in points]
    return [PointRecord(point, record) for point, record in found if record is not None]


def write_results(output: Path, rows: Sequence[PointRecord]) -> None:
    """Write ``results.jsonl``, one object for each point.

    The file is complete or unchanged.
    """
    lines = [
        json.dumps({"point": row.point.title, "mode": row.point.mode, "series": row.point.series, **row.record})
        for row in rows
    ]
    write_text(output / RESULTS, "".join(f"{line}\n" for line in lines))
