"""The program as a user starts it: torchrun, bash, refusals, and what happens when a rank dies."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml

from tests.distributed.launch import SCRIPT, ended, environment, run_tool, start_job, torchrun, typed

KEYS = {
    *("step", "loss", "positive_log_ratio", "negative_log_ratio", "margin", "accuracy", "grad_norm", "learning_rate"),
    *("samples_per_second", "tokens_per_second"),
}


def arguments(data, **settings):
    """``--set`` arguments of a short run from random weights."""
    short = {
        "data.path": data,
        "training.pretrained_checkpoint": "null",
        "training.output_dir": "run",
        "training.train_iters": 3,
        "training.micro_batch_size": 4,
        "training.global_batch_size": 16,
        **{key.replace("__", "."): value for key, value in settings.items()},
    }
    return [argument for key, value in short.items() for argument in ("--set", f"{key}={value}")]


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_torchrun_trains_logs_saves_and_continues(digit_shards, tmp_path):
    first = torchrun(1, SCRIPT, *arguments(digit_shards), cwd=tmp_path)
    assert first.returncode == 0, first.stderr[-3000:]
    lines = first.stdout.splitlines()
    assert lines[0].startswith("cca: emu3-tiny, fp32, TP 1 x PP 1 on 1 process(es)")
    assert lines[1] == "step-0 log-ratio: exactly 0 (policy - reference, 32 rows, nats)"
    assert lines[2] == "reference: frozen; the first update left its log-probabilities as they were, to the last bit"
    run = tmp_path / "run"
    assert [row["step"] for row in rows(run)] == [0, 1, 2]
    assert set(rows(run)[0]) >= KEYS
    assert rows(run)[0]["positive_log_ratio"] == rows(run)[0]["negative_log_ratio"] == 0.0
    assert list((run / "tensorboard").glob("events*"))
    assert yaml.safe_load((run / "config.yaml").read_text())["training"]["train_iters"] == 3
    assert (run / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "3\n"
    assert not list((run / "checkpoints").glob(".iter*"))

    again = run_tool(SCRIPT, *arguments(digit_shards), cwd=tmp_path)
    assert (again.returncode, "already at step 3" in again.stdout) == (0, True)

    longer = arguments(digit_shards, training__train_iters=5, training__micro_batch_size=2)
    resumed = run_tool(SCRIPT, *longer, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "continuing at step 3" in resumed.stdout
    assert [row["step"] for row in rows(run)] == [0, 1, 2, 3, 4]


@pytest.mark.full
def test_bash_takes_a_config_file(digit_shards, tmp_path):
    (tmp_path / "my.yaml").write_text(
        yaml.safe_dump(
            {
                "objective": {"name": "next_token"},
                "data": {"path": str(digit_shards)},
                "training": {"train_iters": 2, "micro_batch_size": 4, "global_batch_size": 8, "output_dir": "mine"},
                "logging": {"tensorboard": False},
            }
        )
    )
    done = typed("bash", SCRIPT, "--config", "my.yaml", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    logged = rows(tmp_path / "mine")
    assert len(logged) == 2
    assert "positive_log_ratio" not in logged[0]
    assert not (tmp_path / "mine" / "tensorboard").exists()


def test_the_default_pretrains_its_base_once(digit_shards, tmp_path):
    """The path of ``torchrun examples/pretrain_cca_emu3.sh`` without arguments, with short schedules."""
    short = {"micro_batch_size": 4, "global_batch_size": 8, "train_iters": 2}
    for name, objective, extra in (("base", "next_token", {}), ("cca", "cca", {"pretrained_checkpoint": "base"})):
        tree = {
            "objective": {"name": objective},
            "data": {"path": str(digit_shards)},
            "training": {**short, **extra, "output_dir": name},
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    program = tmp_path / "program.py"
    program.write_text(
        "from pathlib import Path\nfrom megatron_cca.programs import train\n"
        "def main(argv):\n    train.main(argv, Path('cca.yaml'), Path('base.yaml'))\n"
    )
    first = run_tool(program, "--device", "cpu", cwd=tmp_path)
    assert first.returncode == 0, first.stderr[-3000:]
    assert "next_token: emu3-tiny" in first.stdout
    assert len(rows(tmp_path / "base")) == len(rows(tmp_path / "cca")) == 2
    second = run_tool(program, "--device", "cpu", cwd=tmp_path)
    assert "next_token" not in second.stdout


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"training__train_iter": 3}, "training.train_iter: unknown key; did you mean training.train_iters?"),
        ({"parallel__tensor_model_parallel_size": 3}, "parallel.tensor_model_parallel_size: 3 does not divide"),
        ({"training__pretrained_checkpoint": "nowhere"}, "training.pretrained_checkpoint: no checkpoint at nowhere"),
        ({"data__path": "nowhere"}, "data.path: nowhere/manifest.json is missing"),
    ],
)
def test_refusals_are_one_line_and_leave_nothing(settings, line, digit_shards, tmp_path):
    assert_refused(run_tool(SCRIPT, *arguments(digit_shards, **settings), cwd=tmp_path), line, tmp_path)


def assert_refused(done, line, folder):
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"megatron_cca: error: {line}")
    assert done.stderr.count("\n") == 1
    assert list(folder.iterdir()) == []


def test_bash_hands_a_refusal_on(digit_shards, tmp_path):
    done = typed("bash", SCRIPT, *arguments(digit_shards, training__train_iter=3), cwd=tmp_path)
    assert_refused(done, "training.train_iter: unknown key; did you mean training.train_iters?", tmp_path)


def test_a_blend_with_validation_runs_on_two_ranks(digit_shards, tmp_path):
    blend = f"{{{digit_shards}: 0.5, {tmp_path}/more: 0.5}}"
    shutil.copytree(digit_shards, tmp_path / "more")
    options = {"validation__interval": 2, "validation__fraction": 0.05, "validation__iters": 1}
    jobs = start_job(2, SCRIPT, *arguments(blend, **options), cwd=tmp_path)
    assert ended(jobs) == [0, 0], (tmp_path / "rank0.err").read_text()
    logged = rows(tmp_path / "run")
    assert ["validation_loss" in row for row in logged] == [(row["step"] + 1) % 2 == 0 for row in logged]
    assert all(0 <= row["data_wait"] <= 1 for row in logged)


@pytest.mark.full
def test_torchrun_repeats_the_refusal_as_its_last_word(digit_shards, tmp_path):
    done = torchrun(2, SCRIPT, *arguments(digit_shards, parallel__pipeline_model_parallel_size=4), cwd=tmp_path)
    line = "parallel.tensor_model_parallel_size 1 x parallel.pipeline_model_parallel_size 4 does not divide the 2 proc"
    assert done.returncode != 0
    assert f"megatron_cca: error: {line}" in done.stderr.splitlines()[0] + "".join(done.stderr.splitlines()[-4:])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.full
def test_torchrun_starts_the_program_by_its_name(digit_shards, tmp_path):
    words = ["--config", "emu3_tiny_cca", *arguments(digit_shards)]
    done = torchrun(2, "-m", "megatron_cca", "train", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "on 2 process(es)" in done.stdout


def test_help_names_every_option(tmp_path):
    done = run_tool(SCRIPT, "--help", cwd=tmp_path)
    assert done.returncode == 0
    for option in ("--config", "--set", "--device"):
        assert option in done.stdout


@pytest.mark.full
def test_a_killed_rank_ends_the_job_within_a_minute(digit_shards, tmp_path):
    endless = arguments(digit_shards, training__train_iters=100000, parallel__tensor_model_parallel_size=2)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(SCRIPT)]
    command += endless
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=log, stderr=log)
        try:
            metrics = tmp_path / "run" / "metrics.jsonl"
            _wait(lambda: metrics.exists() and metrics.stat().st_size > 0, 120)
            ranks = [child for child in psutil.Process(job.pid).children() if str(SCRIPT) in " ".join(child.cmdline())]
            assert len(ranks) == 2
            os.kill(ranks[1].pid, signal.SIGKILL)
            assert job.wait(timeout=60) != 0
            assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)
        finally:
            job.kill()
    assert "Signal 9" in (tmp_path / "log").read_text()


def test_a_rank_that_raises_ends_the_job_with_its_error_in_sight(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import torch.distributed as dist, torch\n"
        "from megatron_cca.reporting import reported_errors\n"
        "with reported_errors():\n"
        "    dist.init_process_group('gloo')\n"
        "    if dist.get_rank() == 1:\n"
        "        raise RuntimeError('the disk of rank 1 is on fire')\n"
        "    dist.all_reduce(torch.ones(1))\n"
    )
    started = time.monotonic()
    done = torchrun(2, str(program), cwd=tmp_path, timeout=120)
    assert done.returncode != 0
    assert time.monotonic() - started < 60
    root_cause = done.stderr[done.stderr.index("Root Cause") :]
    assert "the disk of rank 1 is on fire" in root_cause


@pytest.mark.full
def test_a_damaged_sample_ends_the_job_on_the_ranks_that_did_not_read_it(digit_shards, tmp_path):
    shards = shutil.copytree(digit_shards, tmp_path / "shards")
    content = bytearray((shards / "codes.bin").read_bytes())
    content[1000] ^= 4
    (shards / "codes.bin").write_bytes(content)
    options = {"training__train_iters": 1000, "parallel__tensor_model_parallel_size": 2}
    done = torchrun(2, SCRIPT, *arguments(shards, **options), cwd=tmp_path, timeout=120)
    assert done.returncode != 0
    root_cause = done.stderr[done.stderr.index("Root Cause") :]
    assert "data.path: " in root_cause
    assert "codes.bin: sample 31 is not what was written" in root_cause


def _wait(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.2)


def test_the_script_is_valid_bash_and_python():
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    compile(SCRIPT.read_text(), SCRIPT, "exec")
