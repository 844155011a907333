"""The pictures that people look at, as PNG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_cca.io.figures import GREY, INK, save

_POSITIVE, _NEGATIVE, _ACCENT = "#1f6fb2", "#c8553d", "#2a9d6f"


@dataclass(frozen=True)
class SampleColumn:
    """One model's samples: a title, a line below it, and uint8 images ``[rows, columns, H, W]``."""

    title: str
    subtitle: str
    images: np.ndarray


def sample_sheet(path: Path, columns: Sequence[SampleColumn], row_labels: Sequence[str]) -> None:
    """Models side by side, one row per class; dark ink on white."""
    rows, across = columns[0].images.shape[:2]
    cell, gap, title = 0.4, 0.35, 0.62  # inches
    figure = Figure(figsize=(len(columns) * (across * cell + gap) + gap, rows * cell + title), dpi=160)
    axes = figure.subplots(1, len(columns), squeeze=False)[0]
    lines = max(column.subtitle.count("\n") + 1 for column in columns)
    for axis, column in zip(axes, columns, strict=True):
        axis.imshow(255 - _mosaic(column.images), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axis.set_title(column.title, fontsize=10, color=INK, fontweight="bold", pad=8 + 10 * lines)
        axis.text(
            0.5, 1.015, column.subtitle, fontsize=7.5, color=GREY, ha="center", va="bottom", transform=axis.transAxes
        )
        axis.set_xticks([])
        axis.set_yticks([])
        for spine in axis.spines.values():
            spine.set_visible(False)
    pitch = columns[0].images.shape[2] + 1
    axes[0].set_yticks(np.arange(rows) * pitch + pitch / 2, row_labels, fontsize=9, color=GREY)
    axes[0].tick_params(length=0)
    figure.tight_layout(pad=0.6, w_pad=1.2)
    save(figure, path)


def _mosaic(images: np.ndarray) -> np.ndarray:
    rows, across, height, width = images.shape
    canvas = np.zeros((rows * (height + 1), across * (width + 1)), dtype=np.uint8)
    for row in range(rows):
        for column in range(across):
            top, left = row * (height + 1), column * (width + 1)
            canvas[top : top + height, left : left + width] = images[row, column]
    return canvas


def training_curves(path: Path, metrics: Sequence[dict[str, float]]) -> None:
    """Log-ratios, margin and loss of a CCA run over its steps."""
    figure = Figure(figsize=(10, 3.1), dpi=160)
    ratios, margin, loss = figure.subplots(1, 3)
    _curve(ratios, metrics, "positive_log_ratio", "matched pairs", _POSITIVE)
    _curve(ratios, metrics, "negative_log_ratio", "mismatched pairs", _NEGATIVE)
    ratios.axhline(0, color=GREY, linewidth=0.6)
    _label(ratios, "log-ratio policy / reference", "nats per image")
    ratios.legend(frameon=False, fontsize=8)
    _curve(margin, metrics, "margin", "margin", _ACCENT)
    _label(margin, "margin: matched - mismatched", "nats per image")
    _curve(loss, metrics, "loss", "loss", INK)
    _label(loss, "loss", "nats")
    figure.tight_layout()
    save(figure, path)


def _curve(axis: Axes, metrics: Sequence[dict[str, float]], name: str, label: str, colour: str) -> None:
    # A gap where a step has no such number.
    values = [math.nan if row.get(name) is None else row[name] for row in metrics]
    axis.plot([row["step"] for row in metrics], values, color=colour, label=label, linewidth=1.6)


def _label(axis: Axes, title: str, unit: str) -> None:
    axis.set_title(title, fontsize=10, color=INK)
    axis.set_xlabel("step", fontsize=8, color=GREY)
    axis.set_ylabel(unit, fontsize=8, color=GREY)
    axis.tick_params(labelsize=8, colors=GREY)
    axis.grid(alpha=0.25)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
