"""FID over two keys, with the region drawn where training collapses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from megatron_cca.io.figures import GREY, INK, save
from megatron_cca.lab.studies.results import Result, Results
from megatron_cca.lab.studies.study import Method
from megatron_cca.lab.studies.words import axis_name, value_name

_BORDER = "#d62728"
Cells = Mapping[tuple[int, int], Result]


def heatmap(path: Path, title: str, results: Results, method: Method, x: str, y: str) -> None:
    """A method's FID over the values of two keys, one cell a combination.

    Args:
        path: the PNG.
        title: one line.
        results: of the study.
        method: that sweeps both keys.
        x, y: the keys, across and up.
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
    axes.set_xlabel(axis_name(x), fontsize=9, color=INK)
    axes.set_ylabel(axis_name(y), fontsize=9, color=INK)
    axes.tick_params(labelsize=8.5, colors=INK, length=0)
    axes.set_title(title, fontsize=10.5, color=INK, pad=10)
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
    # At 1, 2 and 5 of each power of ten, as more would run into one another.
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
    """A line around every group of cells, none between two of a group."""
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
