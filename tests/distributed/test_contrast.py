"""Runs in which nothing can be contrasted say so, and log no number that they did not measure."""

import json

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_cca.data.shard_writing import Sample
from megatron_cca.training.run_log import read_events
from tests.distributed.launch import SCRIPT, run_tool, run_workers
from tests.distributed.test_launch import arguments
from tests.distributed.test_layout_parity import PP2, under
from tests.references import token_shards

UNDEFINED = {"negative_log_ratio", "margin", "accuracy"}


@pytest.fixture(scope="module")
def one_caption(tmp_path_factory):
    random = np.random.default_rng(0)
    samples = [Sample(random.integers(128, size=(2, 3)), np.array([5, 6, 7])) for _ in range(24)]
    return token_shards.write(tmp_path_factory.mktemp("data") / "shards", samples)


def test_data_of_one_caption_are_said_and_undefined_numbers_left_out(one_caption, tmp_path):
    options = {"training__train_iters": 2, "validation__fraction": 0.3, "validation__interval": 1}
    done = run_tool(SCRIPT, *arguments(one_caption, **options), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    said = done.stdout.splitlines()
    assert said[1].startswith("data.path: all 24 samples have the same condition: nothing to contrast; cca only raises")
    assert "nothing to contrast" in said[-2]
    assert "acc" not in said[-2]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = {name.removeprefix("validation_") for row in rows for name in row}
    assert not logged & UNDEFINED
    assert [row["positive_as_negative"] for row in rows] == [row["validation_positive_as_negative"] for row in rows]
    curves = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload().Tags()["scalars"]
    assert "positive_log_ratio" in curves
    assert not UNDEFINED & {name.removeprefix("validation_") for name in curves}
    told = [event for event in read_events(tmp_path / "run") if event["event"] == "nothing_to_contrast"]
    # Of the training data, and of what is held out of them.
    assert len(told) == 2
    assert "step" not in told[0]


@pytest.mark.parametrize("objective", ["cca", "dpo", "unlearning"])
def test_no_layout_makes_numbers_of_nothing(objective, one_caption, tmp_path):
    common = [*under(objective), f"data.path={one_caption}", f"training.output_dir={tmp_path}/run"]
    layouts = {"PP 2": PP2, "DP 2": ["training.micro_batch_size=2"]}
    found = run_workers(2, "traces", {"common": common, "layouts": layouts, "steps": 2}, tmp_path)
    for rows in found.values():
        assert all(row["positive_as_negative"] == 1 for row in rows)
        assert not UNDEFINED & {name for row in rows for name in row}
    if objective == "dpo":
        for row in found["DP 2"]:
            assert row["loss"] == pytest.approx(np.log(2), rel=1e-6)
            assert row["grad_norm"] == pytest.approx(0, abs=1e-5)
