"""The plot of a sweep: the speed of a GPU against the number of GPUs, and the shares of a step's time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from megatron_cca.io.figures import BLUE, COLOURS, GREY, INK, LEGEND, RED, TITLE, YELLOW, save, style_axes
from megatron_cca.lab.scaling.points import Row
from megatron_cca.lab.scaling.report import Group, Series, groups_of, units
from megatron_cca.lab.scaling.sweep import MEASURED, Sweep

_MARKERS = {"weak": "o", "strong": "s"}
_SHARES = {"computing and the rest": BLUE, "communication": YELLOW, "pipeline bubble": RED}
_WIDTH, _HEIGHT = 13.5, 4.3
# The margin beside the points, as a factor. The distance between neighbours of the same size, as a share of the axis.
_MARGIN, _SHIFT = 1.4, 0.008
# The least number of bars that fill the axis. Fewer bars do not become wider.
_FEWEST_BARS = 6


def plot(path: Path, sweep: Sweep, measured: Sequence[Row], planned: Sequence[Row]) -> None:
    """Draw one row of panels for each group of comparable series.

    Filled markers are measured. Hollow ones are planned.
    """
    groups = groups_of(measured, planned)
    figure = Figure(figsize=(_WIDTH, _HEIGHT * len(groups)), dpi=110)
    rows = figure.subplots(len(groups), 2, squeeze=False, width_ratios=(1, 1.15))
    for (speed, shares), group in zip(rows, groups, strict=True):
        _draw_speed(speed, group)
        _draw_shares(shares, group)
    figure.tight_layout(h_pad=2.0, w_pad=2.0)
    save(figure, path)


def _draw_speed(axes: Axes, group: Group) -> None:
    sizes = sorted({size for one in group.series for size in one.sizes})
    # With a single layout, colours distinguish modes. With several, they distinguish layouts.
    by = "name" if len({one.name for one in group.series}) > 1 else "mode"
    names = list(dict.fromkeys(getattr(one, by) for one in group.series))
    shift = (sizes[-1] / sizes[0] * _MARGIN**2) ** _SHIFT
    for index, one in enumerate(group.series):
        colour = COLOURS[names.index(getattr(one, by)) % len(COLOURS)]
        _draw_series(axes, one, colour, shift ** (index - (len(group.series) - 1) / 2))
    _draw_ideal(axes, group)
    # Leave room for the legend.
    axes.set_ylim(0, (1.1 + 0.045 * (len(group.series) + 1)) * axes.get_ylim()[1])
    axes.set_title(f"{' and '.join(group.kinds)}: {group.title}", loc="left", **TITLE)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(sizes[0] / _MARGIN, sizes[-1] * _MARGIN)
    axes.legend(loc="upper center", ncols=2, **LEGEND)
    style_axes(axes, across=_x_label(group), up=f"tokens/s/{group.unit}", grid="y")


def _x_label(group: Group) -> str:
    bars = {
        MEASURED: "measured bars: slowest and fastest step",
        "planned": "planned bars: two standard deviations of the model's error and of clusters' losses",
    }
    return f"{units(group.unit)}; {'; '.join(bars[kind] for kind in group.kinds)}"


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


def _draw_ideal(axes: Axes, group: Group) -> None:
    """Draw the ideal line of each mode and kind.

    It keeps the speed of the smallest point.
    """
    firsts = {(one.kind, one.mode): one.speeds[0] for one in reversed(group.series)}
    for index, speed in enumerate(firsts.values()):
        label = "ideal: as fast as the smallest" if index == 0 else None
        axes.axhline(speed, color=GREY, linewidth=0.9, linestyle=(0, (6, 3)), zorder=0, label=label)


def _draw_shares(axes: Axes, group: Group) -> None:
    bars = [(one, row) for one in group.series for row in one.rows]
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
    axes.set_title(f"where a step's time goes, {' and '.join(group.kinds)}", loc="left", **TITLE)
    axes.legend(loc="upper center", ncols=3, **LEGEND)
    style_axes(axes, grid="y")
    axes.tick_params(axis="x", labelsize=size)


def _short(row: Row) -> str:
    return row.record["layout"].replace(" x ", ", ")


def _shares(row: Row) -> tuple[float, float, float]:
    communication, bubble = row.record["communication"], row.record["bubble"]
    return max(0.0, 1 - communication - bubble), communication, bubble
