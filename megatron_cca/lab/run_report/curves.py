"""The curves of a run as SVG files, one for each quantity."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_cca.io.figures import BLUE, COLOURS, GREEN, GREY, INK, LEGEND, RED, TITLE, style_axes

# Longer runs are drawn as the mean and the range of so many equal parts.
_PARTS = 250
_VALIDATION = "validation_"


@dataclass(frozen=True)
class Panel:
    """Quantities that share a diagram: a title, a unit, and names of metrics with their labels and colours."""

    title: str
    unit: str
    curves: tuple[tuple[str, str, str], ...]
    has_zero: bool = False


_PANELS = (
    Panel("loss", "nats", (("loss", "training", INK),)),
    Panel(
        "log-ratio policy / reference",
        "nats per image",
        (("positive_log_ratio", "matched pairs", BLUE), ("negative_log_ratio", "mismatched pairs", RED)),
        has_zero=True,
    ),
    Panel("margin: matched - mismatched", "nats per image", (("margin", "training", GREEN),), has_zero=True),
    Panel("pairs told apart", "share of pairs", (("accuracy", "training", BLUE),)),
    Panel("gradient norm", "", (("grad_norm", "", INK),)),
    Panel("learning rate", "", (("learning_rate", "", INK),)),
    Panel("speed", "samples per second", (("samples_per_second", "", INK),)),
    Panel("wait for data", "share of a step", (("data_wait", "", INK),)),
    Panel("peak memory of rank 0", "GiB", (("peak_memory_gib", "", INK),)),
)
# Other units of what stands in a diagram already.
_SAID = {"step", "tokens_per_second"}


@dataclass(frozen=True)
class Drawn:
    """A diagram: its title for those who do not see it, and its SVG."""

    title: str
    svg: bytes


def draw_curves(metrics: Sequence[dict[str, Any]], marks: Sequence[int]) -> tuple[list[Drawn], dict[str, float]]:
    """Draw every quantity of a run over its steps. None is passed over.

    Args:
        metrics: rows of ``metrics.jsonl``, in order.
        marks: steps at which something happened, shown as dotted lines.

    Returns:
        The diagrams, and the quantities with one value throughout, which need none.
    """
    names = list(dict.fromkeys(name for row in metrics for name in row))
    constant, drawn = {}, []
    for panel in _panels(names):
        series = {name: _series(metrics, name) for name, _, _ in panel.curves}
        series = {name: one for name, one in series.items() if len(one[1])}
        if all(np.ptp(values) == 0 for _, values in series.values()):
            constant |= {name: float(values[0]) for name, (_, values) in series.items()}
        elif series:
            drawn.append(Drawn(panel.title, _svg(panel, series, marks)))
    return drawn, constant


def _panels(names: Sequence[str]) -> list[Panel]:
    """Return the known panels with what was validated, then one for each other quantity."""
    found, taken = [], set(_SAID)
    for panel in _PANELS:
        curves = list(panel.curves)
        curves += [
            (f"{_VALIDATION}{name}", f"{label}, held out".removeprefix("training, "), GREEN if colour == INK else INK)
            for name, label, colour in panel.curves
            if f"{_VALIDATION}{name}" in names
        ]
        found.append(Panel(panel.title, panel.unit, tuple(curves), panel.has_zero))
        taken |= {name for name, _, _ in curves}
    others = [name for name in names if name not in taken]
    return [
        *found,
        *(
            Panel(name.replace("_", " "), "", ((name, "", COLOURS[index % len(COLOURS)]),))
            for index, name in enumerate(others)
        ),
    ]


def _series(metrics: Sequence[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps that have a number, and the numbers."""
    rows = [(row["step"], row[name]) for row in metrics if isinstance(row.get(name), (int, float))]
    found = np.array(rows, dtype=np.float64).reshape(-1, 2)
    return found[:, 0], found[:, 1]


def _svg(panel: Panel, series: dict[str, tuple[np.ndarray, np.ndarray]], marks: Sequence[int]) -> bytes:
    figure = Figure(figsize=(4.3, 2.7))
    axes = figure.subplots()
    for name, label, colour in panel.curves:
        if name in series:
            _draw(axes, *series[name], label, colour)
    if panel.has_zero:
        axes.axhline(0, color=GREY, linewidth=0.6)
    for step in marks:
        axes.axvline(step, color=GREY, linewidth=0.7, linestyle=":")
    axes.set_title(panel.title, **TITLE)
    style_axes(axes, across="step", up=panel.unit)
    if len(series) > 1:
        axes.legend(**LEGEND)
    figure.tight_layout()
    target = io.BytesIO()
    # Without a date and with fixed names, the same run gives the same file.
    with mpl.rc_context({"svg.hashsalt": panel.title, "svg.fonttype": "path"}):
        figure.savefig(target, format="svg", metadata={"Date": None})
    return target.getvalue()


def _draw(axes: Axes, steps: np.ndarray, values: np.ndarray, label: str, colour: str) -> None:
    if len(steps) <= _PARTS:
        marker = "." if len(steps) < 8 else ""
        axes.plot(steps, values, color=colour, label=label, linewidth=1.4, marker=marker)
        return
    cuts = [part * len(steps) // _PARTS for part in range(_PARTS)]
    lows, highs = np.minimum.reduceat(values, cuts), np.maximum.reduceat(values, cuts)
    lengths = np.diff([*cuts, len(steps)])
    means, places = (np.add.reduceat(one, cuts) / lengths for one in (values, steps))
    axes.fill_between(places, lows, highs, color=colour, alpha=0.18, linewidth=0)
    axes.plot(places, means, color=colour, label=label, linewidth=1.4)


def last_value(metrics: Sequence[dict[str, Any]], name: str, count: int = 10) -> float | None:
    """Return the mean of a quantity's last numbers; None if it has none."""
    values = [row[name] for row in metrics if isinstance(row.get(name), (int, float))][-count:]
    return math.fsum(values) / len(values) if values else None
