"""What a sweep's picture and table show, as numbers: points in series, series that may share axes in groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_cca.lab.planner.hardware import name_of_device
from megatron_cca.lab.scaling.records import Row
from megatron_cca.lab.scaling.sweep import MEASURED


@dataclass(frozen=True)
class Series:
    """Points of one mode on one layout, by world size.

    Attributes:
        kind: measured or planned.
        mode: weak or strong.
        name: of the layout.
        rows: finished ones.
    """

    kind: str
    mode: str
    name: str
    rows: list[Row]

    @property
    def label(self) -> str:
        """For legends."""
        return f"{self.kind}, {self.mode}, {self.name}"

    @property
    def sizes(self) -> list[int]:
        """World sizes."""
        return [row.record["num_gpus"] for row in self.rows]

    @property
    def speeds(self) -> list[float]:
        """Tokens/s of a GPU."""
        return [row.record["tokens_per_second_per_gpu"] for row in self.rows]

    @property
    def errors(self) -> tuple[list[float], list[float]]:
        """How far the ends of the bars are below and above :attr:`speeds`."""
        records = [row.record for row in self.rows]
        below = [max(0.0, one["tokens_per_second_per_gpu"] - one["low"]) for one in records]
        above = [max(0.0, one["high"] - one["tokens_per_second_per_gpu"]) for one in records]
        return below, above


@dataclass(frozen=True)
class Group:
    """Series that may stand on the same axes: of one model and data on one device.

    Attributes:
        title: says what they are of.
        device: theirs.
        series: measured ones first.
    """

    title: str
    device: str
    series: list[Series]

    @property
    def unit(self) -> str:
        """What there is a growing number of: GPUs, or processes on a CPU."""
        return unit_of(self.device)

    @property
    def kinds(self) -> list[str]:
        """Which of measured and planned there are."""
        return list(dict.fromkeys(one.kind for one in self.series))


def unit_of(device: str) -> str:
    """What a point has several of."""
    return "process" if device.startswith("CPU") else "GPU"


def units(unit: str) -> str:
    """Several of them."""
    return {"process": "processes", "GPU": "GPUs"}[unit]


def groups_of(measured: Sequence[Row], planned: Sequence[Row]) -> list[Group]:
    """The finished points, in groups: planned ones join measured ones only where model, data and GPU are the same."""
    found: dict[tuple, list[Row]] = {}
    for row in (*measured, *planned):
        if row.is_finished:
            found.setdefault(_what(row), []).append(row)
    return [_group(rows) for rows in found.values()]


def _what(row: Row) -> tuple:
    device = row.record["device"]
    if row.task.kind == MEASURED:
        device = row.task.how["gpu"] or name_of_device(device) or device
    return device, row.task.config.model, row.task.config.objective.name, row.task.images


def _group(rows: Sequence[Row]) -> Group:
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault((row.task.kind, row.task.mode, row.task.series), []).append(row)
    series = [Series(*key, sorted(some, key=lambda row: row.record["num_gpus"])) for key, some in found.items()]
    device, task = rows[0].record["device"], rows[0].task
    height, width = task.images.height, task.images.width
    title = f"{task.config.model.name} ({task.config.objective.name}), {height}x{width} tokens, on {device}"
    return Group(title, device, series)


def efficiency(row: Row, rows: Sequence[Row]) -> float:
    """Tokens/s of a GPU as a share of the smallest world size's in the same mode: on the same layout if it was there.

    Args:
        row: a finished one.
        rows: all finished ones.
    """
    alike = [one for one in rows if (one.task.kind, one.task.mode) == (row.task.kind, row.task.mode)]
    fewest = min(one.record["num_gpus"] for one in alike)
    smallest = [one for one in alike if one.record["num_gpus"] == fewest]
    same = [one for one in smallest if one.task.series == row.task.series]
    best = max(one.record["tokens_per_second_per_gpu"] for one in same or smallest)
    return row.record["tokens_per_second_per_gpu"] / best


def with_one_peak(rows: Sequence[Row]) -> list[Row]:
    """The same points, MFU of one peak: what the others' processes do can only make a measured peak too low."""
    peak = max((row.record["peak_flops"] for row in rows if row.is_finished), default=0.0)
    return [
        replace(
            row, record={**row.record, "mfu": row.record["mfu"] * row.record["peak_flops"] / peak, "peak_flops": peak}
        )
        if row.is_finished
        else row
        for row in rows
    ]
