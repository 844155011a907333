"""The benchmarks run, and the ways that they compare compute the same thing. Nothing here looks at a time."""

import json
import sys

import pytest

from tests.distributed.launch import ROOT, typed

pytestmark = pytest.mark.full


def table(name, *arguments):
    """The rows of a benchmark's Markdown table, by column name."""
    done = typed(sys.executable, ROOT / "benchmarks" / name, *arguments, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines() if "|" in line]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def test_all_ways_to_log_probabilities_agree():
    ways = ("dense", "ours", "ours, main_grad", "megatron", "torch, chunked")
    arguments = ("--tokens", "32", "--hidden-size", "16", "--device", "cpu", "--repetitions", "1")
    rows = table("logps.py", *arguments, "--ways", *ways, "Liger")
    assert [row["way"] for row in rows] == [*ways, "Liger"]
    assert all(float(row["differs by"]) < 1e-5 for row in rows[:4])
    # Its sum over tokens is in fp32.
    assert float(rows[4]["differs by"]) < 1e-3
    # What is not there is a line, and no end.
    assert rows[5]["forward ms"].startswith("not installed") and not rows[5]["total ms"]


def test_measurements_of_log_probabilities_are_plain_data_within_a_time(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import logps

    shape = logps.Shape(8, 4, vocabulary=300)
    rows = logps.measure(shape, ["dense", "ours, main_grad", "torch, chunked", "Liger"], repetitions=3)
    assert json.loads(json.dumps(rows)) == rows
    for row in rows[:3]:
        assert row["repetitions"] == 3 and row["tflops"] > 0
        assert 0 < row["total_ms"]["least"] <= row["total_ms"]["median"] <= row["total_ms"]["most"]
        for name in ("sum", "hidden_norm", "weight_norm"):
            assert row[name] == pytest.approx(rows[0][name], rel=1e-4)
    assert rows[3]["note"].startswith("not installed")
    (late,) = logps.measure(shape, ["dense"], seconds=0)
    assert late["note"] == "no time was left"
    assert len(logps.table([*rows, late]).splitlines()) == 2 + 5


def test_three_steps_have_the_losses_of_plain_transformers():
    """Three optimizer steps on the same weights and tokens, at Emu3's true vocabulary."""
    pytest.importorskip("transformers")
    rows = table("step.py", "--grid", "3", "--hidden-size", "64", "--device", "cpu")
    losses = {row["way"]: [float(row[f"loss {step}"]) for step in range(3)] for row in rows}
    assert losses["megatron_cca"] == pytest.approx(losses["transformers"], rel=1e-4)
    assert len(set(losses["megatron_cca"])) == 3


def test_everything_for_a_gpu_is_rehearsed_and_a_part_without_memory_is_a_line(tmp_path):
    """The whole command; LlamaGen is made too wide for any machine, which the parts after it do not notice."""
    output = tmp_path / "gpu.jsonl"
    too_wide = ["--set", f"llamagen:model.hidden_size={1 << 20}"]
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--minutes", "13", "--output", output, *too_wide]
    done = typed(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in output.read_text().splitlines()]
    statuses = {}
    for line in found:
        assert "rehearsal" in line and line["about"]["megatron-core"] and line["date"]
        statuses.setdefault(line["part"], set()).add(line["status"])
    assert list(statuses) == ["head", "tests", "step", "llamagen", "lora", "bias", "plan"]
    assert statuses.pop("llamagen") == {"out of memory"}
    assert all("measured" in some and "failed" not in some for some in statuses.values()), statuses
    assert "**This is a rehearsal" in done.stdout and "out of memory at" in done.stdout
    predicted = [line for line in found if line["part"] == "plan" and "line" in line["settings"]]
    assert predicted and all(line["figures"]["calibrated_ms"] > 0 for line in predicted)
