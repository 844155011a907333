"""Interrupted and resumed equals uninterrupted, also on another layout; checkpoints are whole or absent."""

import pytest
import torch

from tests.distributed.launch import run_workers
from tests.distributed.test_layout_parity import CCA, CP2, LOSS_RTOL, NORM_RTOL, PP2, TP2, VPP2, column, under

BEFORE, AFTER = 4, 6
LAYOUTS = {
    "DP 2": (2, ["training.micro_batch_size=2"]),
    "TP 2": (2, TP2),
    "PP 2": (2, PP2),
    "PP 2 x VPP 2": (2, VPP2),
    "CP 2": (2, CP2),
    "one process": (1, []),
}
# Warm-up and decay, so that a schedule that restarts would show.
SCHEDULE = ["optimizer.lr_warmup_iters=3", "optimizer.lr_decay_style=cosine", "training.train_iters=10"]


def run(layout, folder, steps, data, *extra, save=False, objective="cca"):
    ranks, overrides = LAYOUTS[layout]
    common = [*under(objective), *SCHEDULE, f"data.path={data}", f"training.output_dir={folder}/run", *extra]
    settings = {"overrides": [*common, *overrides], "steps": steps, "save": save}
    return run_workers(ranks, "checkpoint_workers.resume", settings, folder)


@pytest.fixture(scope="module")
def uninterrupted(digit_shards, tmp_path_factory):
    return run("one process", tmp_path_factory.mktemp("whole"), BEFORE + AFTER, digit_shards)["rows"]


@pytest.fixture(scope="module")
def interrupted(digit_shards, tmp_path_factory):
    """A run stopped after BEFORE steps at DP 2 with the distributed optimizer."""
    folder = tmp_path_factory.mktemp("interrupted")
    answer = run("DP 2", folder, BEFORE, digit_shards, save=True)
    assert (answer["before"], answer["latest"]) == (0, BEFORE)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resumed_on_any_layout_equals_uninterrupted(layout, uninterrupted, interrupted, digit_shards):
    answer = run(layout, interrupted, AFTER, digit_shards)
    assert answer["before"] == BEFORE
    expected = uninterrupted[BEFORE:]
    for name, tolerance in (("loss", LOSS_RTOL), ("grad_norm", NORM_RTOL), ("learning_rate", 1e-12)):
        torch.testing.assert_close(column(answer["rows"], name), column(expected, name), rtol=tolerance, atol=0)


def test_a_run_of_interleaved_chunks_continues_anywhere(uninterrupted, digit_shards, tmp_path):
    run("PP 2 x VPP 2", tmp_path, BEFORE, digit_shards, save=True)
    answer = run("TP 2", tmp_path, AFTER, digit_shards)
    assert answer["before"] == BEFORE
    expected = column(uninterrupted[BEFORE:], "loss")
    torch.testing.assert_close(column(answer["rows"], "loss"), expected, rtol=LOSS_RTOL, atol=0)


@pytest.mark.parametrize("extra", [["training.precision=bf16"], ["optimizer.use_distributed_optimizer=false"]])
def test_other_optimizers_resume_exactly(extra, digit_shards, tmp_path):
    whole = run("TP 2", tmp_path / "whole", BEFORE + 2, digit_shards, *extra)["rows"]
    run("TP 2", tmp_path / "cut", BEFORE, digit_shards, *extra, save=True)
    rest = run("TP 2", tmp_path / "cut", 2, digit_shards, *extra)["rows"]
    assert [row["loss"] for row in rest] == [row["loss"] for row in whole[BEFORE:]]
    assert [row["grad_norm"] for row in rest] == [row["grad_norm"] for row in whole[BEFORE:]]


def test_dropout_resumes_exactly(digit_shards, tmp_path):
    extra, plain = ["model.hidden_dropout=0.1", "model.attention_dropout=0.1"], {"objective": "next_token"}
    whole = run("PP 2", tmp_path / "whole", BEFORE + 2, digit_shards, *extra, **plain)["rows"]
    run("PP 2", tmp_path / "cut", BEFORE, digit_shards, *extra, save=True, **plain)
    rest = run("PP 2", tmp_path / "cut", 2, digit_shards, *extra, **plain)["rows"]
    assert [row["loss"] for row in rest] == [row["loss"] for row in whole[BEFORE:]]


def test_a_run_that_has_ended_leaves_nothing_in_its_process(digit_shards, tmp_path):
    """Neither weights nor the thread that reads ahead: the base before the default run, and a study's, must be gone."""
    overrides = [*CCA, f"data.path={digit_shards}", "training.train_iters=2", "logging.tensorboard=false"]
    runs = {
        "fp32": [f"training.output_dir={tmp_path}/fp32"],
        "bf16": ["training.precision=bf16", f"training.output_dir={tmp_path}/bf16"],
        "diverged": ["optimizer.lr=1e30", f"training.output_dir={tmp_path}/diverged"],
    }
    found = run_workers(1, "checkpoint_workers.forgotten_runs", {"overrides": overrides, "runs": runs}, tmp_path)
    assert {name: run["models"] for name, run in found.items()} == dict.fromkeys(runs, 0)
    # Those of a pool or two that stays; DALI's alone are four.
    assert all(run["threads"] < 4 for run in found.values()), found
    assert [run["ended"] == "finished" for run in found.values()] == [True, True, False]
