"""The one style of all figures, and the contact sheet. This module needs matplotlib."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_cca.io.outputs import whole_file

INK, GREY = "#1b1b1b", "#6b6b6b"
# The palette of Okabe and Ito, which colour-blind readers can distinguish.
BLUE, SKY, ORANGE, GREEN = "#0072b2", "#56b4e9", "#e69f00", "#009e73"
RED, PINK, YELLOW = "#d55e00", "#cc79a7", "#f0e442"
# In this order where things only have to differ.
COLOURS = (BLUE, RED, GREEN, PINK, ORANGE, SKY, "#7a5195")
LEGEND = {"fontsize": 7.5, "labelcolor": INK, "frameon": False}
LABEL = {"fontsize": 8.5, "color": INK}
TITLE = {"fontsize": 9.5, "color": INK}


def style_axes(axes: Axes, *, across: str = "", up: str = "", grid: Literal["both", "x", "y"] = "both") -> None:
    """Give axes the look of all diagrams: small grey ticks, a faint grid behind what is drawn, no box.

    Args:
        axes: with everything drawn.
        across, up: the axes' labels; empty leaves them as they are.
        grid: across which axis there are lines.
    """
    if across:
        axes.set_xlabel(across, **LABEL)
    if up:
        axes.set_ylabel(up, **LABEL)
    axes.tick_params(labelsize=7.5, colors=GREY)
    axes.grid(axis=grid, alpha=0.25)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def contact_sheet(path: Path, images: Sequence[np.ndarray], captions: Sequence[str]) -> None:
    """Write a PNG that shows images uint8 ``[H, W, 3]`` of any sizes, each with its caption below it."""
    across = min(4, len(images))
    rows = -(-len(images) // across)
    figure = Figure(figsize=(across * 2.6, rows * 3.1), dpi=130)
    axes = figure.subplots(rows, across, squeeze=False).reshape(-1)
    for axis in axes:
        axis.set_axis_off()
    for axis, image, caption in zip(axes, images, captions, strict=False):
        axis.imshow(image, interpolation="nearest" if max(image.shape) < 64 else "antialiased")
        lines = textwrap.wrap(caption, 34, max_lines=4, placeholder=" ...") or [""]
        # A caption may hold dollar signs, which are no mathematics here.
        axis.set_title("\n".join(lines), fontsize=7, color=INK, y=-0.04, va="top", parse_math=False)
    with warnings.catch_warnings():
        # The font lacks the letters of some scripts, and draws boxes for them.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.tight_layout(pad=0.8, h_pad=2.2)
        save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG on white. The file is whole or not there."""
    FigureCanvasAgg(figure)
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", facecolor="white", bbox_inches="tight", pad_inches=0.12)
