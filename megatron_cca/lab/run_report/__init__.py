"""One HTML file about a run: what it was told, how it went, what it drew, how it was judged. Here: the options."""

from __future__ import annotations

from dataclasses import KW_ONLY
from pathlib import Path
from typing import Annotated

from pydantic import Field

from megatron_cca.io.options import File, Option, options


@options
class ReportOptions:
    """The run, and what to show beside it."""

    run: Annotated[Path, Option(metavar="RUN", name="run")]
    """the folder of a run: its training.output_dir; a run that still trains may be read, too"""
    _: KW_ONLY
    output: Annotated[File, Option(metavar="FILE.html")]
    """the HTML file to write; it holds everything that it shows"""
    overwrite: bool = False
    """replace the file"""
    evaluation: Annotated[tuple[Path, ...], Option(metavar="DIR")] = ()
    """an output folder of megatron-cca evaluate or study, whose table and plots are shown; may be repeated; those
    inside the run's folder are found without it"""
    gpu: Annotated[str, Option(metavar="NAME")] | None = None
    """the GPUs of the run, such as h100-80gb, to predict its speed and memory (default: what the run wrote down)"""
    calibration: File | None = None
    """what megatron-cca plan calibrate measured on that device; a CPU's speed is predicted with it alone"""
    gpus_per_node: Annotated[int, Field(ge=1)] | None = None
    """GPUs that NVLink connects (default: those of that kind's usual servers)"""
    image_grid: Annotated[str, Option(metavar="HxW")] | None = None
    """grid of visual tokens that the prediction is of (default: the largest in the run's shards, or the model's own)"""
    caption_tokens: Annotated[int, Field(ge=0)] | None = None
    """tokens of the longest caption (default: of the run's shards, or none)"""
