"""Interrupted and resumed equals uninterrupted, also on another layout; checkpoints are whole or absent."""

import pytest
import torch

from tests.distributed.launch import run_workers
from tests.distributed.test_layout_parity import (
    CCA,
    CP2,
    LOSS_RTOL,
    NORM_RTOL,
    PP2,
    SIZED_BY_PRESET,
    TP2,
    TP2_SP,
    VPP2,
    column,
    under,
)
from tests.selection import Computed

BEFORE, AFTER = 4, 6
LAYOUTS = {
    "DP 2": (2, ["training.micro_batch_size=2"]),
    "TP 2": (2, TP2),
    "TP 2 + SP": (2, TP2_SP),
    "PP 2": (2, PP2),
    "PP 2 x VPP 2": (2, VPP2),
    "CP 2": (2, CP2),
    "one process": (1, []),
}
# Warm-up and decay, so that a schedule that restarts would show.
SCHEDULE = ["optimizer.lr_warmup_iters=3", "optimizer.lr_decay_style=cosine", "training.train_iters=10"]
OF_VAR = ("one process", "DP 2", "TP 2 + SP")
CASES = [*(("Emu3", layout) for layout in LAYOUTS), *(("VAR", layout) for layout in OF_VAR)]


@pytest.fixture(scope="module")
def models(digit_shards, tiny_var):
    """By family: the overrides of a run of its tiny model."""
    return {"Emu3": [*CCA, f"data.path={digit_shards}"], "VAR": [*SIZED_BY_PRESET, *tiny_var]}


def run(layout, folder, steps, model, *extra, save=False, objective="cca"):
    ranks, overrides = LAYOUTS[layout]
    common = [*under(objective, model), *SCHEDULE, f"training.output_dir={folder}/run", *extra]
    settings = {"overrides": [*common, *overrides], "steps": steps, "save": save}
    return run_workers(ranks, "checkpoint_workers.resume", settings, folder)


@pytest.fixture(scope="module")
def uninterrupted(models, tmp_path_factory):
    """By family: the steps of a run that was not stopped."""

    def whole(family):
        folder = tmp_path_factory.mktemp("whole")
        return {family: run("one process", folder, BEFORE + AFTER, models[family])["rows"]}

    return Computed(whole)


@pytest.fixture(scope="module")
def interrupted(models, tmp_path_factory):
    """By family: a run stopped after BEFORE steps at DP 2 with the distributed optimizer."""

    def stopped(family):
        folder = tmp_path_factory.mktemp("interrupted")
        answer = run("DP 2", folder, BEFORE, models[family], save=True)
        assert (answer["before"], answer["latest"]) == (0, BEFORE)
        return {family: folder}

    return Computed(stopped)


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_resumed_on_any_layout_equals_uninterrupted(family, layout, uninterrupted, interrupted, models):
    answer = run(layout, interrupted[family], AFTER, models[family])
    assert answer["before"] == BEFORE
    assert_same_steps(answer["rows"], uninterrupted[family][BEFORE:])


def assert_same_steps(rows, expected):
    for name, tolerance in (("loss", LOSS_RTOL), ("grad_norm", NORM_RTOL), ("learning_rate", 1e-12)):
        torch.testing.assert_close(column(rows, name), column(expected, name), rtol=tolerance, atol=0)


@pytest.mark.parametrize(
    ("family", "layouts"),
    [("Emu3", {"PP 2 x VPP 2": BEFORE, "TP 2": AFTER}), ("VAR", {"one process": 3, "TP 2 + SP": 3, "DP 2": 4})],
)
def test_a_run_continues_from_layout_to_layout(family, layouts, uninterrupted, models, tmp_path):
    done = 0
    for layout, steps in layouts.items():
        answer = run(layout, tmp_path, steps, models[family], save=True)
        assert answer["before"] == done
        assert_same_steps(answer["rows"], uninterrupted[family][done : done + steps])
        done += steps


@pytest.mark.parametrize(
    ("family", "extra"),
    [
        ("Emu3", ["training.precision=bf16"]),
        ("Emu3", ["optimizer.use_distributed_optimizer=false"]),
        ("VAR", ["training.precision=bf16"]),
    ],
)
def test_other_optimizers_resume_exactly(family, extra, models, tmp_path):
    whole = run("TP 2", tmp_path / "whole", BEFORE + 2, models[family], *extra)["rows"]
    run("TP 2", tmp_path / "cut", BEFORE, models[family], *extra, save=True)
    rest = run("TP 2", tmp_path / "cut", 2, models[family], *extra)["rows"]
    assert [row["loss"] for row in rest] == [row["loss"] for row in whole[BEFORE:]]
    assert [row["grad_norm"] for row in rest] == [row["grad_norm"] for row in whole[BEFORE:]]


@pytest.mark.parametrize(
    ("family", "layout", "extra"),
    [
        ("Emu3", "PP 2", ["model.hidden_dropout=0.1", "model.attention_dropout=0.1"]),
        ("VAR", "TP 2", ["model.attention_dropout=0.1"]),
    ],
)
def test_dropout_resumes_exactly(family, layout, extra, models, tmp_path):
    model, plain = models[family], {"objective": "next_token"}
    whole = run(layout, tmp_path / "whole", BEFORE + 2, model, *extra, **plain)["rows"]
    run(layout, tmp_path / "cut", BEFORE, model, *extra, save=True, **plain)
    rest = run(layout, tmp_path / "cut", 2, model, *extra, **plain)["rows"]
    assert [row["loss"] for row in rest] == [row["loss"] for row in whole[BEFORE:]]
    unlike = run(layout, tmp_path / "without", BEFORE + 2, model, **plain)["rows"]
    assert [row["loss"] for row in unlike[BEFORE:]] != [row["loss"] for row in rest]


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
