"""The plots of a study as PNG: the FID-IS plane, metrics against a key, a heatmap over two keys, all methods."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from megatron_cca.io.figures import COLOURS, GREY, INK, LABEL, LEGEND, TITLE, save, style_axes
from megatron_cca.lab.studies import PlotSettings
from megatron_cca.lab.studies.checks import file_name, plotted_methods, swept_keys
from megatron_cca.lab.studies.results import METRICS, Result, Results, axis_name, key_name, method_name, value_name
from megatron_cca.lab.studies.study import BASE, Method

_SINGLE = {BASE: (INK, "s"), "control": (GREY, "D")}
# From this ratio of the largest FID to the smallest on, the scale is logarithmic.
_LOG_RATIO = 5.0
# Where there are more methods than colours, the next ones have the colours again and another marker.
_STYLES = [(colour, marker) for marker in "o^vP" for colour in COLOURS]
# The legend lies over curves. Its background keeps the text readable.
_LEGEND = {**LEGEND, "frameon": True, "facecolor": "white", "edgecolor": "none", "framealpha": 0.85}
_TICKS = [factor * 10.0**power for power in range(-1, 5) for factor in (1, 1.5, 2, 3, 5, 7)]
_BORDER = "#d62728"
Cells = Mapping[tuple[int, int], Result]


@dataclass(frozen=True)
class _Curve:
    """Results along one key, in the order of the sweep.

    A single point has no key.
    """

    label: str
    key: str | None
    points: list[Result]
    colour: str
    marker: str

    def column(self, metric: str) -> tuple[list[float], list[float]]:
        """Return the means and the standard deviations of a metric."""
        found = [result.statistics[metric] for result in self.points]
        return [one.mean for one in found], [one.std or 0.0 for one in found]


def plot(folder: Path, results: Results, settings: PlotSettings) -> None:
    """Draw one of a study's plots into ``folder``.

    Points without a finished seed are left out.
    """
    study = results.study
    title = settings.title or study.settings.title or study.settings.name
    methods = plotted_methods(study, settings)
    if not any(result.statistics for method in methods for result in results.of(method.name)):
        save(_nothing(title), folder / file_name(settings))
        return
    if settings.kind == "heatmap":
        heatmap(folder / file_name(settings), title, results, methods[0], settings.x, settings.y)
        return
    draw = {"frontier": _frontier, "against": _against, "comparison": _comparison}[settings.kind]
    figure = draw(results, methods, settings)
    figure.suptitle("\n".join(textwrap.wrap(title, 88)), fontsize=10.5, color=INK, y=0.985, va="top")
    seeds, dots = len(study.settings.seeds), "; dots: seeds" if settings.kind == "comparison" else ""
    spread = f"means of {seeds} seeds, {study.settings.samples} images each; lines: standard deviation over seeds{dots}"
    figure.text(0.5, 0.008, spread, fontsize=7, color=GREY, ha="center", va="bottom")
    figure.tight_layout(rect=(0, 0.02, 1, 0.985))
    save(figure, folder / file_name(settings))


def _nothing(title: str) -> Figure:
    figure = Figure(figsize=(7.6, 2.0), dpi=170)
    figure.suptitle("\n".join(textwrap.wrap(title, 88)), fontsize=10.5, color=INK)
    figure.text(0.5, 0.4, "none of these runs finished", fontsize=9, color=GREY, ha="center")
    return figure


def _curves(results: Results, methods: Sequence[Method], along: str | None) -> list[_Curve]:
    """Return one curve for each combination of a method's other swept keys.

    If ``along`` is None, a curve follows the method's last key.
    """
    curves: list[_Curve] = []
    for method in methods:
        keys = swept_keys(method)
        found = [one for one in results.of(method.name) if one.statistics]
        if not keys:
            style = _SINGLE.get(method.name) or _next(curves)
            curves += [_Curve(method_name(method), None, found[:1], *style)] if found else []
            continue
        key = along or keys[-1]
        groups: dict[str, list[Result]] = {}
        for result in found:
            if not result.row.is_chosen:
                others = [f"{key_name(name)} {value_name(result.row.values[name])}" for name in keys if name != key]
                groups.setdefault(", ".join([method_name(method), *others]), []).append(result)
        for label, points in groups.items():
            curves.append(_Curve(label, key, points, *_next(curves)))
    return curves


def _next(curves: Sequence[_Curve]) -> tuple[str, str]:
    """Return colour and marker of the next curve."""
    taken = sum(curve.colour in COLOURS for curve in curves)
    return _STYLES[taken % len(_STYLES)]


def _frontier(results: Results, methods: Sequence[Method], settings: PlotSettings) -> Figure:
    figure = Figure(figsize=(7.6, 5.2), dpi=170)
    axes = figure.subplots()
    curves = _curves(results, methods, settings.x)
    for height, curve in enumerate(reversed(curves)):
        (scores, score_stds), (fids, fid_stds) = curve.column("inception_score"), curve.column("fid")
        label = curve.label if curve.key is None else f"{curve.label}, along {axis_name(curve.key)}"
        style = {"color": curve.colour, "marker": curve.marker, "markersize": 5.5, "linewidth": 1.6, "label": label}
        axes.errorbar(scores, fids, xerr=score_stds, yerr=fid_stds, elinewidth=0.7, zorder=3 + height, **style)
        if curve.key is not None:
            _values(axes, curve, scores, fids)
    style_axes(axes, across="Inception Score (higher is better)", up="FID (lower is better)")
    _fid_axis(axes, [value for curve in curves for value in curve.column("fid")[0]])
    axes.margins(0.08)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], **_LEGEND)
    return figure


def _values(axes: Axes, curve: _Curve, across: Sequence[float], up: Sequence[float]) -> None:
    for result, x, y in zip(curve.points, across, up, strict=True):
        text = value_name(result.row.values[curve.key])
        place = {"xytext": (5, 5), "textcoords": "offset points"}
        halo = [withStroke(linewidth=2.2, foreground="white")]
        axes.annotate(text, (x, y), fontsize=7.5, color=curve.colour, zorder=20, path_effects=halo, **place)


def _against(results: Results, methods: Sequence[Method], settings: PlotSettings) -> Figure:
    figure = Figure(figsize=(10.5, 4.4), dpi=170)
    panels = figure.subplots(1, 2)
    curves = _curves(results, methods, settings.x)
    for axes, metric, better in zip(panels, ("fid", "inception_score"), ("lower", "higher"), strict=True):
        for curve in curves:
            means, stds = curve.column(metric)
            places = [result.row.values[settings.x] for result in curve.points]
            style = {"color": curve.colour, "marker": curve.marker, "markersize": 4.5, "linewidth": 1.6, "capsize": 2}
            axes.errorbar(places, means, yerr=stds, elinewidth=0.8, label=curve.label, **style)
        _control_line(axes, results, metric)
        style_axes(axes, across=axis_name(settings.x), up=f"{METRICS[metric][0]} ({better} is better)")
        places = [result.row.values[settings.x] for curve in curves for result in curve.points]
        if min(places) > 0 and max(places) / min(places) > 20:
            axes.set_xscale("log")
    _fid_axis(panels[0], [value for curve in curves for value in curve.column("fid")[0]])
    panels[1].legend(**_LEGEND)
    return figure


def _control_line(axes: Axes, results: Results, metric: str) -> None:
    for control in results.of("control")[:1]:
        if control.statistics:
            style = {"color": GREY, "linestyle": "--", "linewidth": 1.2, "zorder": 1}
            axes.axhline(control.statistics[metric].mean, label="control, guidance-free", **style)


def _comparison(results: Results, methods: Sequence[Method], settings: PlotSettings) -> Figure:
    shown = [one for method in methods for one in results.of(method.name)[:1] if one.statistics]
    metrics = [name for name in ("fid", "inception_score", "accuracy", "recall") if name in shown[0].statistics]
    figure = Figure(figsize=(2.5 * len(metrics) + 1.6, 0.4 * len(shown) + 1.9), dpi=170)
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        _panel(axes, shown, metric)
    panels[0].set_yticks(range(len(shown)), [_passes(one) for one in shown], fontsize=8.5, color=INK)
    panels[0].set_ylim(len(shown) - 0.5, -0.5)
    return figure


def _passes(result: Result) -> str:
    passes = result.row.run.sampling.forwards_per_token
    name = "base" if result.row.method.name == BASE else result.row.method.label
    return f"{name}, {passes} pass{'es' if passes > 1 else ''} a token"


def _panel(axes: Axes, shown: Sequence[Result], metric: str) -> None:
    styles = itertools.cycle(_STYLES)
    for place, one in enumerate(shown):
        colour, marker = _SINGLE.get(one.row.method.name) or next(styles)
        mean, spread = one.statistics[metric].mean, one.statistics[metric].std or 0.0
        axes.errorbar([mean], [place], xerr=[spread], color=colour, marker=marker, markersize=7, elinewidth=1.4)
        dots = [metrics[metric] for metrics in one.seeds.values()]
        axes.plot(dots, [place + 0.24] * len(dots), "o", color=colour, alpha=0.55, markersize=3)
    better = "lower" if metric == "fid" else "higher"
    style_axes(axes, across=f"{METRICS[metric][0]} ({better} is better)", grid="x")
    axes.margins(x=0.08)
    means = [one.statistics[metric].mean for one in shown]
    if metric == "fid" and max(means) > _LOG_RATIO * min(means):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(_TICKS))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())


def _fid_axis(axes: Axes, values: Sequence[float]) -> None:
    if values and max(values) > _LOG_RATIO * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(FixedLocator(_TICKS))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def heatmap(path: Path, title: str, results: Results, method: Method, x: str, y: str) -> None:
    """Draw a method's FID over the values of two keys, one cell for each combination.

    Args:
        path: the PNG.
        title: one line.
        results: the results of the study.
        method: a method that sweeps both keys.
        x, y: the keys of the horizontal and the vertical axis.
    """
    swept = [result for result in results.of(method.name) if not result.row.is_chosen]
    across, up = (sorted({result.row.values[key] for result in swept}) for key in (x, y))
    cells = {(up.index(one.row.values[y]), across.index(one.row.values[x])): one for one in swept}
    figure = Figure(figsize=(1.28 * len(across) + 2.3, 0.86 * len(up) + 2.1), dpi=170)
    axes = figure.subplots()
    _colour(figure, axes, cells, (len(up), len(across)))
    for place, result in cells.items():
        _write(axes, place, result, results)
    _outline(axes, {place for place, result in cells.items() if result.is_lost})
    axes.set_xticks(range(len(across)), [value_name(value) for value in across])
    axes.set_yticks(range(len(up)), [value_name(value) for value in up])
    axes.set_xlabel(axis_name(x), **LABEL)
    axes.set_ylabel(axis_name(y), **LABEL)
    axes.tick_params(labelsize=8.5, colors=INK, length=0)
    axes.set_title(title, pad=10, **TITLE)
    figure.text(0.5, 0.005, _caption(results), fontsize=7, color=GREY, ha="center", va="bottom")
    figure.tight_layout(rect=(0, 0.075, 1, 1))
    save(figure, path)


def _caption(results: Results) -> str:
    settings = results.study.settings
    return (
        f"FID (standard deviation) of {len(settings.seeds)} seeds; below it the last log-ratio of matched pairs.\n"
        f"Outlined: collapse, FID above {settings.collapse:g} x the base's "
        f"({results.base.statistics['fid'].mean:.1f}) or no finite loss, in most seeds."
    )


def _colour(figure: Figure, axes: Axes, cells: Cells, shape: tuple[int, int]) -> None:
    fids = np.full(shape, np.nan)
    for place, result in cells.items():
        if "fid" in result.statistics:
            fids[place] = result.statistics["fid"].mean
    known = fids[np.isfinite(fids)]
    norm = LogNorm(known.min(), known.max()) if known.size and known.min() < known.max() else None
    axes.set_facecolor("#dddddd")
    image = axes.imshow(fids, cmap="cividis_r", norm=norm, origin="lower", aspect="auto", interpolation="nearest")
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.03)
    bar.set_label("FID, log scale", fontsize=8, color=GREY)
    bar.ax.tick_params(labelsize=7.5, colors=GREY)
    # Ticks at 1, 2 and 5 of each power of ten. More labels would overlap.
    bar.ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}") if known.size else NullFormatter())


def _write(axes: Axes, place: tuple[int, int], result: Result, results: Results) -> None:
    row, column = place
    fid = result.statistics.get("fid")
    if fid is None:
        axes.text(column, row, "failed", ha="center", va="center", fontsize=8.5, color=INK)
        return
    image = axes.images[0]
    red, green, blue, _ = image.cmap(image.norm(fid.mean))
    ink = INK if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"
    digits = 0 if fid.mean >= 100 else 1
    spread = "" if fid.std is None else f" ({fid.std:.{digits}f})"
    axes.text(column, row + 0.12, f"{fid.mean:.{digits}f}{spread}", ha="center", va="center", fontsize=8.5, color=ink)
    ratio = result.statistics.get("positive_log_ratio")
    below = [] if ratio is None else [f"r {ratio.mean:.1f}"]
    if 0 < result.lost < len(result.row.samplings):
        below.append(f"{result.lost} of {len(result.row.samplings)} lost")
    axes.text(column, row - 0.22, ", ".join(below), ha="center", va="center", fontsize=6.8, color=ink)


def _outline(axes: Axes, lost: set[tuple[int, int]]) -> None:
    """Draw a line around each group of cells, and none between two cells of a group."""
    for row, column in lost:
        for beside, ends in (
            ((row, column - 1), ((column - 0.5, column - 0.5), (row - 0.5, row + 0.5))),
            ((row, column + 1), ((column + 0.5, column + 0.5), (row - 0.5, row + 0.5))),
            ((row - 1, column), ((column - 0.5, column + 0.5), (row - 0.5, row - 0.5))),
            ((row + 1, column), ((column - 0.5, column + 0.5), (row + 0.5, row + 0.5))),
        ):
            if beside not in lost:
                axes.plot(*ends, color=_BORDER, linewidth=2.6, solid_capstyle="projecting", clip_on=False, zorder=5)
        axes.add_patch(
            Rectangle(
                (column - 0.5, row - 0.5), 1, 1, fill=False, hatch="///", edgecolor=_BORDER, linewidth=0, alpha=0.25
            )
        )
