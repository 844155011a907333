"""The report of a sweep: its tables and its plots."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from megatron_cca.io.figures import BLUE, COLOURS, GREY, INK, LEGEND, RED, TITLE, YELLOW, save, style_axes
from megatron_cca.lab import padded_table
from megatron_cca.lab.planner.hardware import name_of_device
from megatron_cca.lab.planner.workload import MFU_MEANS
from megatron_cca.lab.scaling.sweep import MEASURED, PointRecord, Sweep

_HEADER = (
    "mode",
    "{units}",
    "layout",
    "global batch",
    "s/step",
    "tokens/s/{unit}",
    "of the smallest",
    "MFU",
    "GiB",
    "communication",
    "bubble",
    "even bubble",
)
_MARKERS = {"weak": "o", "strong": "s"}
_SHARES = {"computing and the rest": BLUE, "communication": YELLOW, "pipeline bubble": RED}
_WIDTH, _HEIGHT = 13.5, 4.3
# The margin beside the points, as a factor. The distance between neighbours of the same size, as a share of the axis.
_MARGIN, _SHIFT = 1.4, 0.008
# The least number of bars that fill the axis. Fewer bars do not become wider.
_FEWEST_BARS = 6


@dataclass(frozen=True)
class Series:
    """Points of one mode on one layout, by world size.

    Attributes:
        kind: measured or planned.
        mode: weak or strong.
        name: name of the layout.
        rows: finished points.
    """

    kind: str
    mode: str
    name: str
    rows: list[PointRecord]

    @property
    def label(self) -> str:
        """Label for legends."""
        return f"{self.kind}, {self.mode}, {self.name}"

    @property
    def sizes(self) -> list[int]:
        """World sizes."""
        return [row.record["num_gpus"] for row in self.rows]

    @property
    def speeds(self) -> list[float]:
        """Tokens/s of one GPU."""
        return [row.record["tokens_per_second_per_gpu"] for row in self.rows]

    @property
    def errors(self) -> tuple[list[float], list[float]]:
        """Distances in tokens/s from :attr:`speeds` to the lower and to the upper ends of the error bars."""
        records = [row.record for row in self.rows]
        below = [max(0.0, one["tokens_per_second_per_gpu"] - one["low"]) for one in records]
        above = [max(0.0, one["high"] - one["tokens_per_second_per_gpu"]) for one in records]
        return below, above


@dataclass(frozen=True)
class Diagram:
    """Series that may share axes.

    They have the same model, data and device.

    Attributes:
        title: names the model, the data and the device.
        device: the device of the series.
        series: the series, measured ones first.
    """

    title: str
    device: str
    series: list[Series]

    @property
    def unit(self) -> str:
        """Unit of the horizontal axis: GPUs, or processes on a CPU."""
        return unit_of(self.device)

    @property
    def kinds(self) -> list[str]:
        """Kinds of the series: measured, planned, or both."""
        return list(dict.fromkeys(one.kind for one in self.series))


def unit_of(device: str) -> str:
    """Return the name of a point's processes: GPU, or process on a CPU."""
    return "process" if device.startswith("CPU") else "GPU"


def units(unit: str) -> str:
    """Return the plural of a unit."""
    return {"process": "processes", "GPU": "GPUs"}[unit]


def diagrams_of(measured: Sequence[PointRecord], planned: Sequence[PointRecord]) -> list[Diagram]:
    """Return the finished points by the diagram that shows them.

    A planned point joins measured ones only if the model, the data and the GPU are the same.
    """
    found: dict[tuple, list[PointRecord]] = {}
    for row in (*measured, *planned):
        if row.is_finished:
            found.setdefault(_what(row), []).append(row)
    return [_diagram(rows) for rows in found.values()]


def _what(row: PointRecord) -> tuple:
    device = row.record["device"]
    if row.point.kind == MEASURED:
        device = row.point.how["gpu"] or name_of_device(device) or device
    return device, row.point.config.model, row.point.config.objective.name, row.point.images


def _diagram(rows: Sequence[PointRecord]) -> Diagram:
    found: dict[tuple, list[PointRecord]] = {}
    for row in rows:
        found.setdefault((row.point.kind, row.point.mode, row.point.series), []).append(row)
    series = [Series(*key, sorted(some, key=lambda row: row.record["num_gpus"])) for key, some in found.items()]
    device, point = rows[0].record["device"], rows[0].point
    height, width = point.images.height, point.images.width
    title = f"{point.config.model.name} ({point.config.objective.name}), {height}x{width} tokens, on {device}"
    return Diagram(title, device, series)


def efficiency(row: PointRecord, rows: Sequence[PointRecord]) -> float:
    """Return the tokens/s of a GPU as a share of those at the smallest world size in the same mode.

    It compares with the same layout if that world size has it.

    Args:
        row: a finished point.
        rows: all finished points.
    """
    alike = [one for one in rows if (one.point.kind, one.point.mode) == (row.point.kind, row.point.mode)]
    fewest = min(one.record["num_gpus"] for one in alike)
    smallest = [one for one in alike if one.record["num_gpus"] == fewest]
    same = [one for one in smallest if one.point.series == row.point.series]
    best = max(one.record["tokens_per_second_per_gpu"] for one in same or smallest)
    return row.record["tokens_per_second_per_gpu"] / best


def with_one_peak(rows: Sequence[PointRecord]) -> list[PointRecord]:
    """Return the same points with the MFU against the largest measured peak.

    Other processes on the machine can only make a measured peak too low.
    """
    peak = max((row.record["peak_flops"] for row in rows if row.is_finished), default=0.0)
    return [
        replace(
            row, record={**row.record, "mfu": row.record["mfu"] * row.record["peak_flops"] / peak, "peak_flops": peak}
        )
        if row.is_finished
        else row
        for row in rows
    ]


def table(sweep: Sweep, measured: Sequence[PointRecord], planned: Sequence[PointRecord]) -> str:
    """Return the text of ``table.md``.

    It has the measured points with their machine, the planned ones with the model's error, and the failed ones.
    """
    parts = [f"# Scaling: {sweep.settings.name}\n"]
    if measured:
        parts.append(f"## Measured\n\n{_measured_on(measured)}\n\n{_table(measured)}")
    if planned:
        parts.append(f"## Planned, not run\n\n{_planned_on(planned)}\n\n{_table(planned)}")
    failed = [row for row in (*measured, *planned) if not row.is_finished]
    if failed:
        lines = [f"- {row.point.kind} {row.point.title}: {row.record['reason']}" for row in failed]
        parts.append("## Without numbers\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def _measured_on(rows: Sequence[PointRecord]) -> str:
    finished = [row.record for row in rows if row.is_finished]
    if not finished:
        return "No point finished."
    days = sorted({one["date"][:10] for one in finished})
    hosts = sorted({one["host"] for one in finished})
    versions = ", ".join(f"{name} {version}" for name, version in finished[-1]["versions"].items())
    return (
        f"{_device(finished[0])}; host {', '.join(hosts)}; {' to '.join(dict.fromkeys((days[0], days[-1])))}; "
        f"{versions}; megatron_cca {', '.join(sorted({one['code'] for one in finished}))}. Median of "
        f"{len(finished[0]['step_seconds'])} steps, in brackets the slowest and the fastest. Random weights and "
        f"tokens. {MFU_MEANS}"
    )


def _device(record: dict) -> str:
    peak = record["peak_flops"] / 1e9
    if record["device"].startswith("CPU"):
        return f"{record['device']} a process, MFU of {peak:,.0f} GFLOP/s, which a product of one process reached"
    return f"{record['device']}, MFU of {peak / 1e3:,.0f} TFLOP/s"


def _planned_on(rows: Sequence[PointRecord]) -> str:
    return (
        f"{rows[0].point.how['gpu']}, by the planner's model (megatron-cca plan); in brackets two standard deviations "
        f"of its error. {MFU_MEANS} Nobody ran these; what a cluster "
        "adds (stragglers, congestion) and its spread are those of published runs, docs/scaling.md."
    )


def _table(rows: Sequence[PointRecord]) -> str:
    finished = [row for row in rows if row.is_finished]
    if not finished:
        return ""
    unit = unit_of(finished[0].record["device"])
    header = [name.format(unit=unit, units=units(unit)) for name in _HEADER]
    return padded_table(header, [_line(row, finished) for row in finished]) + "\n"


def _line(row: PointRecord, rows: Sequence[PointRecord]) -> list[str]:
    record = row.record
    return [
        row.point.mode,
        str(record["num_gpus"]),
        record["layout"],
        f"{record['global_batch_size']:,}",
        f"{statistics.median(record['step_seconds']):.3g}",
        f"{record['tokens_per_second_per_gpu']:,.0f} ({record['low']:,.0f} to {record['high']:,.0f})",
        f"{efficiency(row, rows):.0%}",
        f"{record['mfu']:.1%}",
        f"{record['memory_gib']:.2f}" if row.point.kind == MEASURED else f"{record['memory_gib']:.1f}",
        f"{record['communication']:.1%}",
        f"{record['bubble']:.1%}",
        f"{record['ideal_bubble']:.1%}",
    ]


def plot(path: Path, sweep: Sweep, measured: Sequence[PointRecord], planned: Sequence[PointRecord]) -> None:
    """Draw one row of panels for each diagram of comparable series.

    Filled markers are measured. Hollow ones are planned.
    """
    diagrams = diagrams_of(measured, planned)
    figure = Figure(figsize=(_WIDTH, _HEIGHT * len(diagrams)), dpi=110)
    rows = figure.subplots(len(diagrams), 2, squeeze=False, width_ratios=(1, 1.15))
    for (speed, shares), diagram in zip(rows, diagrams, strict=True):
        _draw_speed(speed, diagram)
        _draw_shares(shares, diagram)
    figure.tight_layout(h_pad=2.0, w_pad=2.0)
    save(figure, path)


def _draw_speed(axes: Axes, diagram: Diagram) -> None:
    sizes = sorted({size for one in diagram.series for size in one.sizes})
    # With a single layout, colours distinguish modes. With several, they distinguish layouts.
    by = "name" if len({one.name for one in diagram.series}) > 1 else "mode"
    names = list(dict.fromkeys(getattr(one, by) for one in diagram.series))
    shift = (sizes[-1] / sizes[0] * _MARGIN**2) ** _SHIFT
    for index, one in enumerate(diagram.series):
        colour = COLOURS[names.index(getattr(one, by)) % len(COLOURS)]
        _draw_series(axes, one, colour, shift ** (index - (len(diagram.series) - 1) / 2))
    _draw_ideal(axes, diagram)
    # Leave room for the legend.
    axes.set_ylim(0, (1.1 + 0.045 * (len(diagram.series) + 1)) * axes.get_ylim()[1])
    axes.set_title(f"{' and '.join(diagram.kinds)}: {diagram.title}", loc="left", **TITLE)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(sizes[0] / _MARGIN, sizes[-1] * _MARGIN)
    axes.legend(loc="upper center", ncols=2, **LEGEND)
    style_axes(axes, across=_x_label(diagram), up=f"tokens/s/{diagram.unit}", grid="y")


def _x_label(diagram: Diagram) -> str:
    bars = {
        MEASURED: "measured bars: slowest and fastest step",
        "planned": "planned bars: two standard deviations of the model's error and of clusters' losses",
    }
    return f"{units(diagram.unit)}; {'; '.join(bars[kind] for kind in diagram.kinds)}"


def _draw_series(axes: Axes, series: Series, colour: str, shift: float) -> None:
    is_measured, is_weak = series.kind == MEASURED, series.mode == "weak"
    axes.errorbar(
        [size * shift for size in series.sizes],
        series.speeds,
        yerr=series.errors,
        label=series.label,
        color=colour,
        marker=_MARKERS[series.mode],
        markersize=6.5,
        markerfacecolor=colour if is_measured else "white",
        linestyle=("-" if is_weak else "--") if is_measured else ("-." if is_weak else ":"),
        linewidth=1.5 if is_measured else 1.0,
        elinewidth=1.0 if is_measured else 0.6,
        capsize=2.5,
    )


def _draw_ideal(axes: Axes, diagram: Diagram) -> None:
    """Draw the ideal line of each mode and kind.

    It keeps the speed of the smallest point.
    """
    firsts = {(one.kind, one.mode): one.speeds[0] for one in reversed(diagram.series)}
    for index, speed in enumerate(firsts.values()):
        label = "ideal: as fast as the smallest" if index == 0 else None
        axes.axhline(speed, color=GREY, linewidth=0.9, linestyle=(0, (6, 3)), zorder=0, label=label)


def _draw_shares(axes: Axes, diagram: Diagram) -> None:
    bars = [(one, row) for one in diagram.series for row in one.rows]
    edges = {MEASURED: {}, "planned": {"alpha": 0.45, "edgecolor": INK, "linewidth": 0.6, "linestyle": ":"}}
    for position, (one, row) in enumerate(bars):
        bottom = 0.0
        for (name, colour), value in zip(_SHARES.items(), _shares(row), strict=True):
            label = name if position == 0 else None
            axes.bar(position, value, bottom=bottom, width=0.72, color=colour, label=label, **edges[one.kind])
            bottom += value
    names = [f"{one.mode} {row.record['num_gpus']:,}: {_short(row)}" for one, row in bars]
    size = 7.5 if len(bars) <= 14 else 6.0
    axes.set_xticks(range(len(bars)), names, rotation=45, ha="right", rotation_mode="anchor", fontsize=size)
    axes.set_xlim(-0.6, max(len(bars), _FEWEST_BARS) - 0.4)
    axes.set_ylim(0, 1.12)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}" if value <= 1 else ""))
    axes.set_title(f"where a step's time goes, {' and '.join(diagram.kinds)}", loc="left", **TITLE)
    axes.legend(loc="upper center", ncols=3, **LEGEND)
    style_axes(axes, grid="y")
    axes.tick_params(axis="x", labelsize=size)


def _short(row: PointRecord) -> str:
    return row.record["layout"].replace(" x ", ", ")


def _shares(row: PointRecord) -> tuple[float, float, float]:
    communication, bubble = row.record["communication"], row.record["bubble"]
    return max(0.0, 1 - communication - bubble), communication, bubble
