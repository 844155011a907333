"""tools/study.py as a user starts it: alone, with workers, killed and started again, and under torchrun."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from PIL import Image

from megatron_cca.checkpoint import layout
from megatron_cca.checkpoint.summary import recorded_fingerprint
from megatron_cca.data.codebooks import keep_codebook
from megatron_cca.data.manifest import read_manifest
from megatron_cca.data.shard_writing import Sample, write_shards
from megatron_cca.data.shards import TokenShards
from megatron_cca.data.tokenizers import open_text_tokenizer
from megatron_cca.models.emu3 import tiny_vocabulary
from tests.distributed.launch import ROOT, environment, run_tool, torchrun

TOOL = str(ROOT / "tools" / "study.py")
LR = "optimizer.lr"
RUN = {"micro_batch_size": 4, "global_batch_size": 8}
STUDY = {
    "name": "tiny",
    "seeds": [1, 2],
    "tuning_seed": 7,
    "trials": 2,
    "samples": 80,
    "base": {"config": "base.yaml"},
    "methods": {
        "cfg": {"tune": {"sampling.guidance_scale": [0.5, 1.0]}},
        "control": {"config": "control.yaml", "tune": {LR: [0.001, 0.01]}},
        # At the last learning rate the loss is soon no number.
        "cca": {"config": "cca.yaml", "tune": {LR: [0.001, 0.01]}, "sweep": {LR: [0.002, 1.0e30]}},
    },
    "plots": [{"kind": "frontier"}, {"kind": "comparison"}],
}


def written(folder, shards, **changes):
    folder.mkdir(parents=True)
    for name, objective, steps in (("base", "next_token", 4), ("control", "next_token", 8), ("cca", "cca", 3)):
        config = {
            "objective": {"name": objective},
            "data": {"path": str(shards)},
            "training": {**RUN, "train_iters": steps},
            "logging": {"tensorboard": False},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    (folder / "study.yaml").write_text(yaml.safe_dump({**STUDY, **changes}, sort_keys=False))
    return folder


def words(*arguments, output="out"):
    return ["--study", "study.yaml", "--output", output, "--device", "cpu", *arguments]


def run_study(folder, *arguments, output="out"):
    return run_tool(TOOL, *words(*arguments, output=output), cwd=folder)


def studied(folder, *arguments, output="out"):
    done = run_study(folder, *arguments, output=output)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def results(folder, output="out"):
    return json.loads((folder / output / "tiny" / "results.json").read_text())


def result_files(folder, output="out"):
    return {path: path.stat().st_mtime_ns for path in (folder / output).glob("*/*/result.json")}


def test_the_smallest_study_leaves_table_numbers_and_a_plot(digit_shards, tmp_path):
    tuned = {"cfg": STUDY["methods"]["cfg"]["tune"], "control": {LR: [0.001]}, "cca": {LR: [0.001]}}
    tuned["cfg"] = {name: values[:1] for name, values in tuned["cfg"].items()}
    methods = {name: {**method, "tune": tuned[name], "sweep": {}} for name, method in STUDY["methods"].items()}
    changes = {"trials": 1, "methods": methods, "plots": [{"kind": "comparison"}]}
    folder = written(tmp_path / "smallest", digit_shards, **changes)
    studied(folder)
    assert [row["method"] for row in results(folder)["rows"]] == ["base", "cfg", "control", "cca"]
    assert "| base, guidance-free |  | 1 | 0.00 |" in (folder / "out" / "tiny" / "table.md").read_text()
    assert Image.open(folder / "out" / "tiny" / "comparison.png").size > (300, 200)
    before = result_files(folder)
    assert studied(folder).splitlines()[0].startswith("wrote ")
    assert result_files(folder) == before


@pytest.fixture(scope="module")
def alone(digit_shards, tmp_path_factory):
    """A study that one process has run from beginning to end; what it printed."""
    folder = written(tmp_path_factory.mktemp("study") / "alone", digit_shards)
    return folder, studied(folder)


@pytest.mark.full
def test_a_study_leaves_table_numbers_and_plots(alone):
    folder, printed = alone
    found = results(folder)
    assert [row["method"] for row in found["rows"]] == ["base", "cfg", "control", "cca", "cca", "cca"]
    assert all(len(row["seeds"]) == 2 for row in found["rows"][:-1])
    assert "| base, guidance-free |  | 1 | 0.00 |" in (folder / "out" / "tiny" / "table.md").read_text()
    for name in ("frontier", "comparison"):
        assert Image.open(folder / "out" / "tiny" / f"{name}.png").size > (300, 200)
    log = next((folder / "out" / "trained").glob("cca-*/log.txt")).read_text()
    assert "step-0 log-ratio: exactly 0" in log
    assert "step 3/3" not in printed
    assert sum(" train cca " in line for line in printed.splitlines()) == 2 + 2 + 2 * 2
    assert (next((folder / "out" / "sampled").glob("base-*")) / "images.npz").is_file()


@pytest.mark.full
def test_a_run_that_ends_in_nan_is_recorded_and_does_not_end_the_study(alone):
    folder, printed = alone
    lost = results(folder)["rows"][-1]
    assert lost["settings"] == {LR: 1.0e30}
    assert sorted(lost["failed"]) == ["1", "2"]
    assert all(reason.startswith("diverged: ") for reason in lost["failed"].values())
    assert "| 2 failed |" in (folder / "out" / "tiny" / "table.md").read_text()
    assert sum("failed, diverged" in line for line in printed.splitlines()) == 2


@pytest.mark.full
def test_only_what_is_missing_is_done_again(alone):
    folder, _ = alone
    before, found = result_files(folder), results(folder)
    gone = sorted(before)[0], next(path for path in sorted(before) if path.parent.name.startswith("cca-"))
    for path in gone:
        path.unlink()
    printed = studied(folder)
    after = result_files(folder)
    assert {path for path in after if after[path] != before[path]} == set(gone)
    assert len([line for line in printed.splitlines() if line[0].isdigit()]) == 2
    assert results(folder) == found
    assert studied(folder).splitlines()[0].startswith("wrote ")


@pytest.mark.full
def test_a_killed_study_goes_on_with_workers(alone, digit_shards, tmp_path):
    """Killed without a chance to tidy up: its workers leave by themselves, and the rest is done by the next one."""
    folder = written(tmp_path / "killed", digit_shards)
    program = subprocess.Popen(
        [sys.executable, TOOL, *words("--workers", "2")],
        cwd=folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 200
    while len(result_files(folder)) < 5 and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = psutil.Process(program.pid).children(recursive=True)
    program.send_signal(signal.SIGKILL)
    program.wait()
    assert not psutil.wait_procs(workers, timeout=30)[1]
    early = result_files(folder)
    assert 5 <= len(early) < len(result_files(alone[0]))
    studied(folder, "--workers", "2")
    assert early.items() <= result_files(folder).items()
    assert worst_difference(results(folder), results(alone[0])) < 1e-6


@pytest.mark.full
def test_torchrun_finds_the_same_on_two_ranks(alone, digit_shards, tmp_path):
    """Also of a run that ends in NaN: both ranks leave it at the same step and go on together."""
    folder = written(tmp_path / "two", digit_shards, set={"parallel.tensor_model_parallel_size": 2})
    ended = torchrun(2, TOOL, *words(), cwd=folder)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert {path.parent.name for path in result_files(folder)} == {path.parent.name for path in result_files(alone[0])}
    assert worst_difference(results(folder), results(alone[0])) < 1e-3


def worst_difference(one, other):
    """Of all means, relative to their size; everything else must be the same."""
    names = ("method", "settings", "chosen", "forwards_per_token", "training_passes", "collapsed")
    worst = 0.0
    for ours, theirs in zip(one["rows"], other["rows"], strict=True):
        assert [ours[name] for name in names] == [theirs[name] for name in names]
        assert ours["failed"].keys() == theirs["failed"].keys()
        assert ours["mean"].keys() == theirs["mean"].keys()
        pairs = [(value, theirs["mean"][name]) for name, value in ours["mean"].items()]
        worst = max([worst, *(abs(a - b) / max(1.0, abs(b)) for a, b in pairs)])
    return worst


@pytest.mark.parametrize(
    ("changes", "arguments", "said"),
    [
        (
            {"trials": 3},
            (),
            "study.yaml: methods.cfg.tune: 2 settings, but trials is 3; every method is tried at equally many",
        ),
        ({}, ("--workers", "0"), "--workers: must be 1 or more, found 0"),
        ({"nmae": 1}, (), "study.yaml: nmae: unknown key; did you mean name?"),
    ],
)
def test_refusals_run_nothing(changes, arguments, said, digit_shards, tmp_path):
    folder = written(tmp_path / "refused", digit_shards, **changes)
    ended = run_study(folder, *arguments)
    assert ended.returncode == 2
    assert ended.stderr.splitlines() == [f"megatron_cca: error: {said}"]
    assert not (folder / "out").exists()


@pytest.mark.full
def test_no_two_programs_write_into_one_output(alone, tmp_path):
    folder, _ = alone
    handle = os.open(folder / "out", os.O_RDONLY)
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX)
        ended = run_study(folder)
    finally:
        os.close(handle)
    assert ended.returncode == 2
    assert "another process is writing into" in ended.stderr
    assert Path(folder / "out" / "tiny" / "table.md").is_file()


@pytest.fixture(scope="module")
def drawing(digit_shards, tmp_path_factory):
    """A study whose methods draw images for eight samples to train on; what it printed."""
    root = tmp_path_factory.mktemp("drawing")
    few = some_digits(digit_shards, root / "few", 8)
    pairs = {"config": "cca.yaml", "drawing": {"rounds": 2}, "tune": {LR: [0.001]}}
    methods = {
        "control": {"config": "control.yaml", "set": {"training.train_iters": 16}, "tune": {LR: [0.001]}},
        "cca": {"config": "cca.yaml", "set": {"training.train_iters": 6}, "tune": {LR: [0.001]}},
        "ddo": {**pairs, "set": {"objective.name": "ddo", "training.train_iters": 3}},
        "distilled": {
            "config": "control.yaml",
            "set": {"training.train_iters": 16},
            "drawing": {"role": "data"},
            "tune": {"drawing.guidance_scale": [1.0]},
        },
    }
    changes = {"trials": 1, "methods": methods, "plots": [{"kind": "comparison"}], "compare": "cca"}
    folder = written(root / "study", few, **changes)
    return folder, studied(folder)


def some_digits(shards, folder, count):
    """Write the first samples of the digits' shards as a folder of their own."""
    whole = TokenShards(shards, tiny_vocabulary())
    text = open_text_tokenizer(shards)
    samples = [Sample(whole.codes(place), whole.caption(place), None) for place in range(count)]

    def write_extras(partial):
        text.save(partial)
        keep_codebook(partial, shards)

    write_shards(folder, samples, tiny_vocabulary(), text.encode, write_extras)
    return folder


def drawn_folders(folder, output="out"):
    return [path.parent for path in (folder / output / "drawn").glob("*/result.json")]


@pytest.mark.full
def test_methods_draw_what_they_train_on(drawing):
    folder, printed = drawing
    assert [row["method"] for row in results(folder)["rows"]] == ["base", "control", "cca", "ddo", "distilled"]
    assert not any(row["failed"] for row in results(folder)["rows"])
    passes = {row["method"]: row["training_passes"] for row in results(folder)["rows"]}
    assert passes == {"base": 0, "control": 384, "cca": 384, "ddo": 2 * (192 + 8), "distilled": 384 + 16}
    assert "## cca against the others" in (folder / "out" / "tiny" / "table.md").read_text()
    # Three seeds: two rounds of DDO, and guided images.
    assert len(drawn_folders(folder)) == 3 * 3
    bases = list((folder / "out" / "trained").glob("base-*"))
    models = [*bases, *(folder / "out" / "trained").glob("ddo-*")]
    weights = {recorded_fingerprint(layout.resolve(str(model), ""), ""): model for model in models}
    by = [weights[read_manifest(one / "shards")["drawn"]["weights"]] for one in drawn_folders(folder)]
    assert sum(model in bases for model in by) == 2 * 3
    guided = [read_manifest(one / "shards")["drawn"]["guidance_scale"] for one in drawn_folders(folder)]
    assert sorted(guided) == [0.0] * 6 + [1.0] * 3
    assert all(read_manifest(one / "shards")["num_samples"] == 8 for one in drawn_folders(folder))
    assert "draw ddo to train on, seed 7, round 2: " in printed


@pytest.mark.full
def test_images_that_are_there_are_not_drawn_again(drawing):
    """A kill between the shards and their result."""
    folder, _ = drawing
    before = results(folder)
    one = drawn_folders(folder)[0]
    stamp = (one / "shards" / "manifest.json").stat().st_mtime_ns
    (one / "result.json").unlink()
    printed = studied(folder)
    assert len([line for line in printed.splitlines() if line[0].isdigit()]) == 1
    assert (one / "shards" / "manifest.json").stat().st_mtime_ns == stamp
    assert results(folder) == before


@pytest.mark.full
def test_two_ranks_draw_together(drawing):
    folder, _ = drawing
    study = yaml.safe_load((folder / "study.yaml").read_text())
    ddo = {**study["methods"]["ddo"], "drawing": {}}
    ddo["set"]["training.train_iters"] = 6
    study["methods"], study["compare"] = {"control": study["methods"]["control"], "ddo": ddo}, None
    study["set"] = {"parallel.tensor_model_parallel_size": 2}
    (folder / "two.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    ended = torchrun(2, TOOL, "--study", "two.yaml", "--output", "two", "--device", "cpu", cwd=folder)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert not any(row["failed"] for row in results(folder, "two")["rows"])
    # The first round's images, whoever drew them.
    names = {path.name for path in drawn_folders(folder, "two")}
    assert len(names) == 3
    assert names < {path.name for path in drawn_folders(folder)}
