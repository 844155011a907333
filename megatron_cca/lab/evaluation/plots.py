"""The plots of an evaluation and of the demo, as PNG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_cca.io.figures import (
    BLUE,
    COLOURS,
    GREEN,
    GREY,
    INK,
    LEGEND,
    RED,
    TITLE,
    contact_sheet,
    save,
    style_axes,
)
from megatron_cca.lab.evaluation.image_sets import ImageSet

# With more classes, a sorted curve replaces the bars. They would be thinner than a line.
_MAX_BARS = 30
_ACROSS = 8
# The number of images on a sheet of samples.
_WITH_PROMPTS, _WITHOUT = 16, 48


@dataclass(frozen=True)
class SampleColumn:
    """One model's samples: a title, a line below it, and uint8 images ``[rows, columns, H, W]``."""

    title: str
    subtitle: str
    images: np.ndarray


def sample_sheet(path: Path, columns: Sequence[SampleColumn], row_labels: Sequence[str]) -> None:
    """Draw the samples of models beside each other, one row for each class.

    Digits are dark on white.
    """
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
    """Draw log-ratios, margin and loss of a CCA run over its steps."""
    figure = Figure(figsize=(10, 3.1), dpi=160)
    ratios, margin, loss = figure.subplots(1, 3)
    _curve(ratios, metrics, "positive_log_ratio", "matched pairs", BLUE)
    _curve(ratios, metrics, "negative_log_ratio", "mismatched pairs", RED)
    ratios.axhline(0, color=GREY, linewidth=0.6)
    _finish(ratios, "log-ratio policy / reference", "nats per image")
    ratios.legend(**LEGEND)
    _curve(margin, metrics, "margin", "margin", GREEN)
    _finish(margin, "margin: matched - mismatched", "nats per image")
    _curve(loss, metrics, "loss", "loss", INK)
    _finish(loss, "loss", "nats")
    figure.tight_layout()
    save(figure, path)


def _finish(axis: Axes, title: str, unit: str) -> None:
    axis.set_title(title, **TITLE)
    style_axes(axis, across="step", up=unit)


def _curve(axis: Axes, metrics: Sequence[dict[str, float]], name: str, label: str, colour: str) -> None:
    # A step without the number leaves a gap.
    values = [math.nan if row.get(name) is None else row[name] for row in metrics]
    axis.plot([row["step"] for row in metrics], values, color=colour, label=label, linewidth=1.6)


def fid_is_plane(path: Path, points: Mapping[str, tuple[float, float]]) -> None:
    """Draw sets of samples in the plane of FID and Inception Score.

    Better sets are at the upper left.

    Args:
        path: the PNG.
        points: name -> FID and Inception Score.
    """
    figure = Figure(figsize=(7.2, 3.8), dpi=160)
    axes = figure.subplots()
    for colour, (name, (fid, score)) in zip(_colours(len(points)), points.items(), strict=True):
        axes.scatter([fid], [score], s=52, color=colour, edgecolors="white", linewidths=0.8, label=name, zorder=3)
    axes.margins(0.12)
    axes.set_title("Inception Score against FID", **TITLE)
    style_axes(axes, across="FID (lower is better)", up="Inception Score (higher is better)")
    _legend(axes)
    figure.tight_layout()
    save(figure, path)


def class_accuracy_bars(path: Path, accuracies: Mapping[str, Mapping[int, float]]) -> None:
    """Draw the accuracy of each class.

    For many classes, it is a sorted curve.

    Args:
        path: the PNG.
        accuracies: name of the set -> class -> share between 0 and 1.
    """
    classes = sorted({label for shares in accuracies.values() for label in shares})
    many = len(classes) > _MAX_BARS
    figure = Figure(figsize=(8.5 if many else max(5, 0.5 * len(classes) + 1.8), 3.6), dpi=160)
    axes = figure.subplots()
    draw = _curves if many else _bars
    draw(axes, accuracies, classes)
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    label = "classes, from the best to the worst" if many else "class"
    axes.set_title("class accuracy", **TITLE)
    style_axes(axes, across=label, up="recognised")
    if len(accuracies) > 1:
        _legend(axes)
    figure.tight_layout()
    save(figure, path)


def _bars(axes: Axes, accuracies: Mapping[str, Mapping[int, float]], classes: list[int]) -> None:
    places, width = np.arange(len(classes)), 0.8 / len(accuracies)
    for index, (colour, (name, shares)) in enumerate(zip(_colours(len(accuracies)), accuracies.items(), strict=True)):
        heights = [shares.get(label, np.nan) for label in classes]
        axes.bar(places + (index - (len(accuracies) - 1) / 2) * width, heights, width * 0.92, color=colour, label=name)
    axes.set_xticks(places, [str(label) for label in classes])


def _curves(axes: Axes, accuracies: Mapping[str, Mapping[int, float]], classes: list[int]) -> None:
    for colour, (name, shares) in zip(_colours(len(accuracies)), accuracies.items(), strict=True):
        axes.plot(sorted(shares.values(), reverse=True), color=colour, linewidth=1.6, label=name)


def image_grid(path: Path, title: str, images: np.ndarray, captions: Sequence[str]) -> None:
    """Draw images in rows of eight below a title, each with a short caption below it.

    Args:
        path: the PNG.
        title: one line.
        images: uint8 ``[N, H, W, 3]``, at least one.
        captions: as many captions; all may be empty.
    """
    across = min(_ACROSS, len(images))
    rows = -(-len(images) // across)
    width = 0.62 if max(images.shape[1:3]) < 64 else 1.3  # inches
    height = width * images.shape[1] / images.shape[2] + (0.2 if any(captions) else 0.05)
    figure = Figure(figsize=(max(across, 4) * (width + 0.06) + 0.2, rows * height + 0.45), dpi=160)
    figure.suptitle(title, fontsize=10, color=INK, parse_math=False)
    axes = figure.subplots(rows, across, squeeze=False).reshape(-1)
    for axis in axes:
        axis.set_axis_off()
    for axis, image, caption in zip(axes, images, captions, strict=False):
        axis.imshow(image, interpolation="nearest" if max(image.shape) < 64 else "antialiased")
        axis.set_title(caption, fontsize=7, color=GREY, y=-0.03, va="top", pad=0, parse_math=False)
    figure.tight_layout(pad=0.5, h_pad=0.4, w_pad=0.3)
    save(figure, path)


def draw_samples(path: Path, name: str, one: ImageSet) -> None:
    """Draw some of the images of a set, evenly spaced.

    They are in order of their class if there are labels, and else with their prompts.
    """
    images, labels, prompts = one.images, one.labels, one.prompts
    by_prompt = prompts is not None and labels is None
    order = np.arange(len(images)) if labels is None else np.argsort(labels, kind="stable")
    shown = min(len(images), _WITH_PROMPTS if by_prompt else _WITHOUT)
    picked = order[np.linspace(0, len(images) - 1, shown).round().astype(int)]
    if by_prompt:
        contact_sheet(path, images[picked], [prompts[index] for index in picked])
    else:
        captions = [f"class {labels[index]}" if labels is not None else "" for index in picked]
        image_grid(path, f"{name}: {shown} of {len(images)} images", images[picked], captions)


def _legend(axes: Axes) -> None:
    legend = axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, **LEGEND)
    for text in legend.get_texts():
        # A name may contain dollar signs. They do not start a formula here.
        text.set_parse_math(False)


def _colours(count: int) -> list:
    """Return distinct colours."""
    more = colormaps["tab20"].colors
    return [COLOURS[index] if index < len(COLOURS) else more[(2 * index) % 20] for index in range(count)]
