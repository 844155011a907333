"""A run's page: it shows all that the run left, loads nothing, and refuses folders that no run wrote."""

import base64
import json
import logging
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure
from PIL import Image

from megatron_cca.config.load import config_to_dict, load_config
from megatron_cca.errors import UserError
from megatron_cca.lab import markdown_table
from megatron_cca.lab.planner.hardware import DEFAULT, GPUS, Cluster
from megatron_cca.lab.planner.memory import GIB, predict_memory
from megatron_cca.lab.planner.throughput import predict_step
from megatron_cca.lab.planner.workload import ImageShape, image_workload
from megatron_cca.lab.run_report import ReportOptions, curves
from megatron_cca.lab.run_report.curves import draw_curves
from megatron_cca.lab.run_report.judged import Table, parts_of
from megatron_cca.lab.run_report.page import page
from megatron_cca.programs.report import main
from megatron_cca.training.run_log import MetricsLog, RunLog
from tests.distributed.launch import ROOT

STEPS, BATCH, SECONDS = 40, 64, 0.5
VOID = {"meta", "img", "br"}


def write_run(folder, steps=STEPS, overrides=(), **began):
    """A run's folder, written by the log that training writes with."""
    folder.mkdir(parents=True)
    config = load_config(ROOT / "examples/llamagen_tiny_cca.yaml", [f"training.global_batch_size={BATCH}", *overrides])
    (folder / "config.yaml").write_text(yaml.safe_dump(config_to_dict(config)))
    with RunLog(folder) as log, MetricsLog(folder, 0, steps, tensorboard=False, progress_bar=False) as metrics:
        log.metrics = metrics
        log.event("started", step=0, world_size=2, host="<b>box</b>", device="NVIDIA H100 80GB HBM3", **began)
        for step in range(steps):
            row = {"step": step, "loss": 1.4 - step / 100, "positive_log_ratio": 0.1 * step, "margin": float(step)}
            row |= {"negative_log_ratio": -1.0 * step, "samples_per_second": BATCH / SECONDS, "peak_memory_gib": 1.25}
            row |= {"own_number": step**2, "validation_loss": 1.5} if step % 10 == 9 else {"own_number": step**2}
            metrics.write(row)
        log.event("alarm", step=30, reason="r+ <falls>")
        log.event("finished", step=steps)
    return folder


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "runs" / "cca")


def shown(run, **options):
    return page(ReportOptions(run, output=run / "report.html", **options))


class Reader(HTMLParser):
    """Reads a page: its texts, its images, and whether its tags match."""

    def __init__(self, text):
        super().__init__()
        self.texts, self.images, self.open, self.links = [], {}, [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.links += [value for name, value in found.items() if name in ("src", "href", "action")]
        if tag == "img":
            self.images[found["alt"]] = found["src"]
        if tag not in VOID:
            self.open.append(tag)
        assert tag not in ("script", "link", "iframe", "object", "i")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open and data.strip():
            self.texts.append(" ".join(data.split()))


def test_the_page_shows_all_that_the_run_left_and_loads_nothing(run):
    text = shown(run)
    page = Reader(text)
    for title in ("loss", "log-ratio policy / reference", "margin: matched - mismatched", "own number"):
        assert base64.b64decode(page.images[title].partition(",")[2]).startswith(b"<?xml")
    assert all(link.startswith("data:image/") for link in page.links)
    assert not re.search(r"https?://", re.sub(r"base64,[^\"]*", "", text))
    assert "finished at step 40" in page.texts
    # The last ten of each.
    for value in ("1.055", "+3.45", "-34.5", "128", "1.25 GiB", "40 of 60"):
        assert value in page.texts, value
    assert any("peak_memory_gib 1.25" in one for one in page.texts)
    assert any("r+ <falls>" in one for one in page.texts)
    assert any("<b>box</b>" in one for one in page.texts)
    assert any("beta" in one for one in page.texts)
    assert shown(run).split("<footer>")[0] == text.split("<footer>")[0]


def test_the_prediction_is_the_planners(run):
    config = load_config(run / "config.yaml")
    workload = image_workload(config, ImageShape(4, 4, 0))
    step = predict_step(config, Cluster(GPUS["h100-80gb"], 2, 8), workload, DEFAULT)
    memory = predict_memory(config, 2, workload)
    texts = Reader(shown(run)).texts
    at = texts.index("seconds a step")
    assert texts[at + 1 : at + 4] == [f"{step.total:.3g}", f"{SECONDS:.3g}", f"{step.total / SECONDS - 1:+.0%}"]
    at = texts.index("memory of the fullest rank, GiB")
    assert texts[at + 1] == f"{memory.total / GIB:.2f}"
    other = Reader(shown(run, gpu="a100-80gb")).texts
    assert any(one.startswith("Speed is predicted for a100-80gb") for one in other)


def test_what_the_prediction_lacks_is_said(tmp_path):
    run = write_run(tmp_path / "emu3", overrides=("data.path=gone",))
    config = yaml.safe_load((run / "config.yaml").read_text())
    emu3 = config_to_dict(load_config(ROOT / "examples/emu3_tiny_cca.yaml"))
    (run / "config.yaml").write_text(yaml.safe_dump(emu3 | {"data": config["data"]}))
    (line,) = (one for one in Reader(shown(run)).texts if one.startswith("No prediction"))
    assert "gone" in line
    assert "--image-grid" in line
    assert "seconds a step" in Reader(shown(run, image_grid="4x4", caption_tokens=9)).texts
    (run / "config.yaml").write_text(yaml.safe_dump(emu3 | {"model": {"of_tomorrow": 1}}))
    texts = Reader(shown(run)).texts
    assert any(one.startswith("No prediction: config.yaml is of another version: model.of_tomorrow") for one in texts)


@pytest.mark.parametrize(
    ("event", "details", "words"),
    [
        ("stopped", {"step": 12, "signal": "SIGTERM"}, "stopped at step 12 by SIGTERM"),
        ("failed", {"step": 12, "error": "UserError: <full>"}, "failed at step 12: UserError: <full>"),
        ("resumed", {"step": 12}, "no end is on record after step 40: it still trains, or was killed"),
    ],
)
def test_how_a_run_ended_is_the_first_line(event, details, words, run):
    with RunLog(run) as log:
        log.own_event(event, **details)
    assert Reader(shown(run)).texts[2] == words


def test_pictures_are_thinned_out_and_large_ones_are_jpeg(run):
    (run / "samples").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (700, 2000, 3), dtype=np.uint8)
    for step in range(0, 30):
        Image.fromarray(noise if step == 29 else noise[:8, :8]).save(run / "samples" / f"step_{step:07d}.png")
    images = Reader(shown(run)).images
    titles = [title for title in images if title.startswith("after")]
    assert len(titles) == 12
    assert (titles[0], titles[-1]) == ("after 0 steps", "after 29 steps")
    assert images["after 0 steps"].startswith("data:image/png")
    assert images["after 29 steps"].startswith("data:image/jpeg")
    assert len(images["after 29 steps"]) < 1_500_000
    (run / "samples" / "step_0000029.png").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"step_0000029.png: is no picture"):
        shown(run)


def test_tables_of_evaluations_are_shown_as_they_are(run, tmp_path):
    table = markdown_table(["samples", "FID ↓"], [["a|b", "**3.1**"], ["<i>", "4.2"]], first_number=1)
    for folder in (run / "evaluation", tmp_path / "other"):
        folder.mkdir()
        (folder / "table.md").write_text(f"{table}\n\nReference: scans.\n")
    Image.new("RGB", (8, 8)).save(tmp_path / "other" / "fid_is.png")
    page = Reader(shown(run, evaluation=(tmp_path / "other",)))
    assert page.texts.count("a|b") == page.texts.count("<i>") == page.texts.count("Reference: scans.") == 2
    assert "fid_is" in page.images
    found, text = parts_of(f"{table}\n\nReference: scans.\n")
    assert isinstance(found, Table)
    assert [[cell.text for cell in row] for row in found.rows] == [["a|b", "3.1"], ["<i>", "4.2"]]
    assert [cell.is_bold for row in found.rows for cell in row] == [False, True, False, False]
    assert text == "Reference: scans."


def test_long_runs_are_drawn_as_mean_and_range_of_equal_parts():
    rng = np.random.default_rng(0)
    steps, values = np.arange(1003.0), rng.normal(size=1003)
    axes = Figure().subplots()
    curves._draw(axes, steps, values, "", "k")
    parts = np.array_split(np.arange(1003), [part * 1003 // 250 for part in range(1, 250)])
    drawn = axes.lines[0].get_xydata()
    np.testing.assert_allclose(drawn[:, 0], [steps[one].mean() for one in parts])
    np.testing.assert_allclose(drawn[:, 1], [values[one].mean() for one in parts])
    vertices = axes.collections[0].get_paths()[0].vertices
    assert (vertices[:, 1].min(), vertices[:, 1].max()) == (values.min(), values.max())


def test_every_quantity_is_drawn_or_said():
    rows = [{"step": step, "loss": None if step == 3 else 1.0 * step, "fixed": 2, "odd": step % 2} for step in range(9)]
    drawn, constant = draw_curves([*rows, {"step": 9, "late": float("nan")}], [4])
    assert [one.title for one in drawn] == ["loss", "odd", "late"]
    assert constant == {"fixed": 2.0}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "metrics.jsonl").unlink(), "has no metrics.jsonl; give the training.output_dir of a run"),
        (lambda run: (run / "config.yaml").unlink(), "has no config.yaml; give the training.output_dir of a run"),
        (lambda run: (run / "metrics.jsonl").write_text("{}\n"), "metrics.jsonl: line 1 is damaged"),
        (lambda run: (run / "metrics.jsonl").write_text(""), "metrics.jsonl has no step yet; wait for the first"),
        (lambda run: (run / "events.jsonl").write_text("?\n"), "events.jsonl: line 1 is damaged"),
        (lambda run: (run / "config.yaml").write_text("a: [\n"), "config.yaml"),
    ],
)
def test_folders_that_no_run_wrote_are_refused(spoil, message, run):
    spoil(run)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        shown(run)
    assert "\n" not in str(error.value)


def test_other_refusals(run, tmp_path):
    with pytest.raises(UserError, match=rf"such as {re.escape(str(run))}"):
        shown(run.parent)
    with pytest.raises(UserError, match=r"--evaluation: .* has no table.md"):
        shown(run, evaluation=(tmp_path,))
    with pytest.raises(UserError, match="--gpu: 'tpu' is unknown"):
        shown(run, gpu="tpu")
    output = tmp_path / "page.html"
    main([str(run), "--output", str(output)])
    assert output.read_text().startswith("<!doctype html>")
    again = [sys.executable, "-m", "megatron_cca", "report", str(run), "--output", str(output)]
    ended = subprocess.run(again, capture_output=True, text=True, cwd=ROOT, check=False)
    assert ended.returncode != 0
    assert ended.stderr.strip() == f"megatron_cca: error: --output: {output} exists; give another name or --overwrite"
    main([str(run), "--output", str(output), "--overwrite"])


def test_numbers_of_other_programs_do_not_break_the_page(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 40, "loss": None, "words": "text", "flag": True}) + "\n")
    logging.getLogger("megatron_cca").handlers.clear()
    assert "finished at step 40" in Reader(shown(run)).texts
