"""Sample the quickstart's models, evaluate the images, and write the table, the pictures and two reports."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

from megatron_cca import __version__
from megatron_cca.config.load import load_config
from megatron_cca.data.digits import load_scans
from megatron_cca.generation.decode_loop import SamplingSettings
from megatron_cca.generation.image_generator import open_image_generator
from megatron_cca.generation.prompts import digit_prompts
from megatron_cca.io.outputs import write_text
from megatron_cca.lab.evaluation.classifiers import DigitSvm
from megatron_cca.lab.evaluation.extractors import train_digit_cnn
from megatron_cca.lab.evaluation.fidelity import fidelity
from megatron_cca.lab.evaluation.plots import SampleColumn, sample_sheet, training_curves
from megatron_cca.lab.evaluation.report import TABLE_FILE
from megatron_cca.lab.run_report import ReportOptions
from megatron_cca.lab.run_report.page import page
from megatron_cca.parallel.ranks import initialize_distributed
from megatron_cca.training.run_log import read_metrics

GRID = (4, 4)
CFG_SCALES = (0.25, 0.5, 0.75, 1.0, 2.0)
# (folder, guidance scales); the names in the report follow from both.
MODELS = (("base", (0.0, *CFG_SCALES)), ("control", (0.0,)), ("cca", (0.0,)))
PICTURED = ("base", "control", "base+cfg0.5", "base+cfg1", "cca")
PICTURED_PER_DIGIT = 6
PAGE = "report.html"


def write_report(output: Path, seed: int, samples: int) -> None:
    """Leave samples.png, training.png, table.md, report.json and report.html in ``output``, and print the table."""
    train, held_out = load_scans()
    svm, cnn = DigitSvm(train.images, train.labels), train_digit_cnn(train.images, train.labels)
    labels = np.arange(samples) % 10
    drawn = _draw_all(output, labels, seed)
    rows = [
        {
            "name": name,
            "guidance_scale": scale,
            "accuracy": svm.accuracy(images, labels),
            **fidelity(images, train.images, cnn),
            "forwards_per_token": 1 if scale == 0 else 2,
        }
        for name, (scale, images) in drawn.items()
    ]
    real = {
        "accuracy": svm.accuracy(held_out.images, held_out.labels),
        **fidelity(held_out.images, train.images, cnn),
    }
    report = {"version": __version__, "seed": seed, "samples": samples, "models": rows, "held_out_scans": real}
    (output / "report.json").write_text(json.dumps(report, indent=1))
    _picture(output / "samples.png", {name: images for name, (_, images) in drawn.items()}, rows, labels)
    training_curves(output / "training.png", read_metrics(output / "cca"))
    shown = table(rows, real)
    (output / TABLE_FILE).write_text(f"{shown}\n")
    page_of_cca = ReportOptions(output / "cca", output=output / PAGE, evaluation=(output,))
    write_text(output / PAGE, page(page_of_cca))
    print(shown)


def _draw_all(output: Path, labels: np.ndarray, seed: int) -> dict[str, tuple[float, np.ndarray]]:
    """Per model name its guidance scale and uint8 images ``[N, 8, 8]``; the same captions and seeds for all."""
    initialize_distributed(load_config())
    prompts = digit_prompts(len(labels), seed)
    total = len(labels) * sum(len(scales) for _, scales in MODELS)
    drawn = {}
    with tqdm(total=total, unit="image", desc="sampling", disable=None) as bar:
        for model_name, scales in MODELS:
            generator = open_image_generator(str(output / model_name))
            for scale in scales:
                settings = SamplingSettings(*GRID, guidance_scale=scale)
                pictures = generator.generate(prompts, settings, on_progress=bar.update)
                name = model_name if scale == 0 else f"{model_name}+cfg{scale:g}"
                drawn[name] = (scale, pictures.images[..., 0])
    dist.destroy_process_group()
    return drawn


def _picture(path: Path, images: dict[str, np.ndarray], rows: list[dict], labels: np.ndarray) -> None:
    by_name = {row["name"]: row for row in rows}
    columns = []
    for name in PICTURED:
        row = by_name[name]
        passes = "1 forward" if row["forwards_per_token"] == 1 else f"{row['forwards_per_token']} forwards"
        subtitle = f"{passes} a token\naccuracy {row['accuracy']:.1%}, FID {row['fid']:.1f}"
        blocks = [images[name][labels == digit][:PICTURED_PER_DIGIT] for digit in range(10)]
        columns.append(SampleColumn(_title(name), subtitle, np.stack(blocks)))
    sample_sheet(path, columns, [str(digit) for digit in range(10)])


def _title(name: str) -> str:
    base, _, scale = name.partition("+cfg")
    if scale:
        return f"{base}, CFG {scale}"
    return {"cca": "CCA, guidance-free", "base": "base, guidance-free"}.get(name, name)


def table(rows: list[dict], real: dict) -> str:
    """The results as a Markdown table; the guidance scale is s in (1 + s) cond - s uncond."""
    best = min((row for row in rows if row["guidance_scale"] > 0), key=lambda row: row["fid"])["name"]
    lines = [
        "| model | forwards/token | accuracy | IS | FID |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        name = f"**{row['name']}**" if row["name"] == "cca" else row["name"]
        note = " (its FID-best scale)" if row["name"] == best else ""
        lines.append(
            f"| {name}{note} | {row['forwards_per_token']} | {row['accuracy']:.3f} | {row['inception_score']:.2f} "
            f"| {row['fid']:.2f} |"
        )
    lines.append(
        f"| held-out real scans | | {real['accuracy']:.3f} | {real['inception_score']:.2f} | {real['fid']:.2f} |"
    )
    return "\n".join(lines)
