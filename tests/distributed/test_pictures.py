"""Pictures during training: the same on every layout, and no trace of them in the training."""

import json

import pytest

from megatron_cca.config.load import load_config
from megatron_cca.errors import UserError
from megatron_cca.training.checks import check_run
from tests.distributed.launch import SCRIPT, ended, run_workers, start_job
from tests.distributed.test_layout_parity import CCA, CP2, PP2, TP2, VPP2, under
from tests.selection import mostly_full

STEPS = [2, 3]
EVERY = ["logging.sample_interval=1"]
GATHER = ["optimizer.overlap_grad_reduce=true", "optimizer.overlap_param_gather=true", "optimizer.ddp_bucket_size=2000"]
DROPOUT = ["model.hidden_dropout=0.2", "model.attention_dropout=0.2"]
LAYOUTS = {
    1: {
        "one process": EVERY,
        "no pictures": [],
        "full recompute": [*EVERY, "training.recompute_granularity=full"],
    },
    2: {
        "TP 2 + SP": [*EVERY, *TP2, "parallel.sequence_parallel=true"],
        "PP 2": [*EVERY, *PP2],
        "PP 2 x VPP 2": [*EVERY, *VPP2],
        "DP 2": EVERY,
        "DP 2, gathered": [*EVERY, *GATHER],
        "LoRA": [*EVERY, *TP2, "parallel.sequence_parallel=true", "lora.dim=2"],
    },
}
# Of plain likelihood, on one process.
DROPPING = {"dropout": [*EVERY, *DROPOUT], "dropout, no pictures": DROPOUT}


@pytest.fixture(scope="module", params=mostly_full(STEPS, [2]), ids=lambda steps: f"{steps} steps")
def runs(request, digit_shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    prompts = folder / "prompts.txt"
    prompts.write_text("a handwritten seven\nthe digit one\na scan of a three\n")
    common = [*CCA, f"data.path={digit_shards}", f"training.output_dir={folder}/run"]
    common.append(f"logging.sample_prompts={prompts}")
    dropping = {"common": under("next_token", common), "layouts": DROPPING, "steps": request.param}
    found = run_workers(1, "pictured_steps", dropping, folder)
    for ranks, layouts in LAYOUTS.items():
        settings = {"common": common, "layouts": layouts, "steps": request.param}
        found |= run_workers(ranks, "pictured_steps", settings, folder)
    return found


def test_every_layout_draws_the_same(runs):
    one = runs["one process"]
    for name in ("TP 2 + SP", "PP 2", "PP 2 x VPP 2", "DP 2", "DP 2, gathered", "full recompute"):
        assert runs[name]["before"] == one["before"], name
        assert runs[name]["after"] == one["after"], name
    assert runs["LoRA"]["before"] == one["before"]
    assert runs["dropout"]["before"] == one["before"]
    assert one["after"] != one["before"]
    assert runs["LoRA"]["after"] != runs["LoRA"]["before"]


def test_training_takes_no_notice(runs):
    assert runs["no pictures"]["losses"] == runs["one process"]["losses"]
    assert runs["dropout, no pictures"]["losses"] == runs["dropout"]["losses"]
    for name in ("TP 2 + SP", "PP 2", "PP 2 x VPP 2", "DP 2"):
        assert runs[name]["losses"] == pytest.approx(runs["one process"]["losses"], rel=1e-5), name


def test_a_run_leaves_them_as_files_and_in_tensorboard(tmp_path):
    settings = ["data.path=digits", "objective.name=next_token", "training.train_iters=4", "logging.sample_interval=2"]
    settings += ["training.global_batch_size=8", "training.micro_batch_size=4", "training.output_dir=run"]
    config = tmp_path / "config.yaml"
    config.write_text("{}")
    arguments = [part for setting in settings for part in ("--set", setting)]
    jobs = start_job(2, SCRIPT, "--device", "cpu", "--config", config, *arguments, cwd=tmp_path)
    assert ended(jobs) == [0, 0], (tmp_path / "rank0.err").read_text()
    names = sorted(path.name for path in (tmp_path / "run" / "samples").iterdir())
    assert names == ["step_0000000.png", "step_0000002.png", "step_0000004.png"]
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [0, 1, 2, 3]
    assert events(tmp_path / "run" / "tensorboard") == [0, 2, 4]


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder)).Reload()
    return [event.step for event in found.Images("samples")]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (CP2, "logging.sample_interval: pictures cannot be drawn with parallel.context_parallel_size 2"),
        (["logging.sample_prompts=nowhere.txt"], "logging.sample_prompts: no file at nowhere.txt"),
        (["data.path=shards/mine"], "logging.sample_prompts: name a file with captions"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_the_run(overrides, message):
    config = load_config(None, ["training.micro_batch_size=4", "objective.name=next_token", *EVERY, *overrides])
    with pytest.raises(UserError) as error:
        check_run(config, 2)
    assert str(error.value).startswith(message)
