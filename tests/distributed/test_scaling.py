"""examples/scaling/run.py as a user starts it, also interrupted; and whether it is waiting that is counted."""

import json
import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml
from PIL import Image

from megatron_cca.lab.scaling.waiting import Span, merged, shortest, waiting
from tests.distributed.launch import LIMIT, ROOT, environment, run_tool, run_workers

TOOL = ROOT / "examples" / "scaling" / "run.py"
ARGUMENTS = ["--sweep", "sweep.yaml", "--output", "out", "--device", "cpu"]
LATE = 1.0
SWEEP = {
    "name": "tiny",
    "config": "run.yaml",
    "mode": "weak",
    "world_sizes": [1, 2],
    "layouts": [{"micro_batch_size": 4}, {"pipeline_model_parallel_size": 2}],
    "samples_per_gpu": 8,
    "image_grid": [4, 4],
    "caption_tokens": 24,
    "warmup_steps": 1,
    "steps": 2,
    "profiled_steps": 2,
    "oversubscribe": True,
}


def children_of(process):
    return psutil.Process(process.pid).children(recursive=True)


def wait_for(condition, seconds=200):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert condition()


@pytest.mark.full
def test_a_sweep_that_is_interrupted_goes_on(tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"training": {"micro_batch_size": 2}}))
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(SWEEP))
    options = {"cwd": tmp_path, "env": environment(), "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen([sys.executable, TOOL, *ARGUMENTS], text=True, **options) as sweep:
        points = tmp_path / "out" / "points"
        # In the middle of the second.
        wait_for(lambda: len(list((tmp_path / "out" / "logs").glob("*.log"))) == 2)
        wait_for(lambda: len(children_of(sweep)) >= 3)
        started = children_of(sweep)
        sweep.send_signal(signal.SIGINT)
        said, _ = sweep.communicate(timeout=60)
    assert sweep.returncode == 130 and "megatron_cca: interrupted" in said, said
    assert not psutil.wait_procs(started, timeout=10)[1]
    (first,) = points.iterdir()
    before = first.stat().st_mtime_ns
    done = subprocess.run([sys.executable, TOOL, *ARGUMENTS], text=True, timeout=LIMIT, check=False, **options)
    assert done.returncode == 0 and "Traceback" not in done.stdout, done.stdout
    assert first.stat().st_mtime_ns == before
    records = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [one["point"] for one in records] == ["weak-1-dp", "weak-2-dp", "weak-2-pp2"]
    assert [one["status"] for one in records] == ["finished"] * 3
    alone, data, pipeline = records
    assert (alone["communication"], alone["bubble"]) == (0.0, 0.0)
    assert data["bubble"] == 0.0 < data["communication"] < 1
    assert pipeline["bubble"] > 0 and pipeline["ideal_bubble"] == 1 / (8 + 1)
    assert all(0 < one["mfu"] < 1 and one["low"] <= one["tokens_per_second_per_gpu"] <= one["high"] for one in records)
    # Rows of two images, one step of each sample: whoever computes them, they are as many.
    assert data["global_batch_size"] == pipeline["global_batch_size"] == 2 * alone["global_batch_size"]
    with Image.open(tmp_path / "out" / "scaling.png") as picture:
        assert picture.format == "PNG"
    assert not list((tmp_path / "out").rglob(".*"))


@pytest.mark.full
def test_a_point_that_training_refuses_does_not_end_the_sweep(tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"training": {"micro_batch_size": 5}}))
    changes = {"layouts": [{}], "world_sizes": [1], "samples_per_gpu": 8}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({**SWEEP, **changes}))
    done = run_tool(TOOL, *ARGUMENTS, cwd=tmp_path)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert "weak-1-dp: failed: training.global_batch_size: 8 is not a multiple" in done.stdout
    assert "is not a multiple" in (tmp_path / "out" / "table.md").read_text()


def test_what_the_late_rank_costs_the_others_is_counted_as_waiting(tmp_path):
    found = run_workers(2, "timing_workers.late_ranks", {"late": LATE}, tmp_path)
    spans = {
        name: [[Span(*one[:2], one[2], one[2]) for one in rank] for rank in ranks] for name, ranks in found.items()
    }
    for name, (late, waited) in spans.items():
        transfers = merged([shortest(late), shortest(waited)])
        theirs, ours = waiting(late, transfers, 1.0), waiting(waited, transfers, 1.0)
        whole = ours.bubble if name == "two stages" else ours.communication
        # It cannot have waited less, but for the moment until it began to.
        assert whole > 0.5 * LATE
        assert theirs.communication + theirs.bubble < 0.5 * LATE
    assert all(not span.crosses_stages for rank in spans["one stage"] for span in rank)
    assert waiting(spans["one stage"][1], merged([shortest(spans["one stage"][1])]), 1.0).bubble == 0.0


def test_a_rank_alone_waits_for_nobody(tmp_path):
    assert run_workers(1, "timing_workers.late_ranks", {"late": 0.0}, tmp_path) == {
        "one stage": [[]],
        "two stages": [[]],
    }


def test_an_even_pipeline_has_the_textbooks_bubble(tmp_path):
    """Megatron-Core's own schedule over stages that sleep for their forward and twice as long for their backward."""
    found = run_workers(2, "timing_workers.even_pipeline", {"microbatches": [2, 4], "seconds": 0.05}, tmp_path)
    for microbatches, ranks in found.items():
        for rank in ranks:
            spans = [Span(*one[:2], one[2], one[2]) for one in rank["spans"]]
            transfers = merged(shortest([Span(*one[:2], one[2], one[2]) for one in each["spans"]]) for each in ranks)
            # Sleeps are never too short; what else the machine does makes some too long.
            assert waiting(spans, transfers, rank["seconds"]).bubble == pytest.approx(
                1 / (int(microbatches) + 1), abs=0.1
            )
