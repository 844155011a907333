"""The benchmarks run, and the ways that they compare compute the same thing. Nothing here looks at a time."""

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
    rows = table("logps.py", "--tokens", "32", "--hidden-size", "16", "--device", "cpu")
    assert [row["way"] for row in rows] == ["dense", "ours", "ours, main_grad", "megatron"]
    assert all(float(row["differs by"]) < 1e-5 for row in rows)


def test_three_steps_have_the_losses_of_plain_transformers():
    """Three optimizer steps on the same weights and tokens, at Emu3's true vocabulary."""
    pytest.importorskip("transformers")
    rows = table("step.py", "--grid", "3", "--hidden-size", "64", "--device", "cpu")
    losses = {row["way"]: [float(row[f"loss {step}"]) for step in range(3)] for row in rows}
    assert losses["megatron_cca"] == pytest.approx(losses["transformers"], rel=1e-4)
    assert len(set(losses["megatron_cca"])) == 3
