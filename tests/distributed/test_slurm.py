"""``examples/cluster/slurm.sh`` on two agents, under a Slurm of a few lines."""

import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.distributed.launch import LIMIT, ROOT, environment
from tests.distributed.test_faults import STEPS, TP2, arguments, losses, named, saved
from tests.distributed.test_two_nodes import kill_machine
from tests.references import fake_slurm

JOB = ROOT / "examples" / "cluster" / "slurm.sh"


@pytest.fixture
def variables(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = {"PROJECT": str(ROOT), "PYTHON": sys.executable, "GPUS_PER_NODE": "1", "RDZV_PORT": str(port)}
    return environment() | fake_slurm.install(tmp_path / "bin") | own


def options(data, folder, **settings):
    return ["--device", "cpu", *arguments(data, **TP2, **{"training.output_dir": folder / "run", **settings})]


def requeued(folder):
    log = folder / "bin" / "scontrol.log"
    return log.read_text() if log.exists() else ""


@pytest.mark.full
def test_a_job_that_is_asked_to_go_saves_is_requeued_and_continues(variables, digit_shards, tmp_path):
    command = ["bash", str(JOB), *options(digit_shards, tmp_path, **{"training.save_interval": 2})]
    slow = [*command, "--set", "training.train_iters=10000"]
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(slow, cwd=tmp_path, env=variables, stdout=log, stderr=log)
    try:
        metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + LIMIT
        while not metrics.exists() or metrics.read_text().count("\n") < 3:
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            assert job.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(LIMIT) == 138, (tmp_path / "log").read_text()
    finally:
        kill_machine(job)
    said = (tmp_path / "log").read_text()
    step = saved(tmp_path)[-1]
    assert f"SIGUSR1: step {step} is saved" in said
    assert said.splitlines()[-1] == (
        "slurm.sh: exit status 138; job 4711 goes back into the queue and continues from its newest checkpoint"
    )
    assert requeued(tmp_path) == "requeue 4711\n"
    assert named(tmp_path)[-1] == "stopped"

    again = [*command, "--set", f"training.train_iters={max(STEPS, step + 2)}"]
    done = subprocess.run(
        again, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"continuing at step {step}" in done.stdout
    assert len(losses(tmp_path)) == max(STEPS, step + 2)
    assert requeued(tmp_path) == "requeue 4711\n"


STUB = """#!/bin/sh
# Stands for the agent: ends with the status asked for, or of the signal that comes.
trap 'exit 138' USR1
trap 'exit 143' TERM
[ -n "$STATUS" ] && exit "$STATUS"
: > "$STARTED$SLURM_NODEID"
while :; do sleep 0.05; done
"""


@pytest.fixture
def stub(variables, tmp_path):
    program = tmp_path / "python"
    program.write_text(STUB)
    program.chmod(0o755)
    return variables | {"PYTHON": str(program), "STARTED": str(tmp_path / "started"), "STATUS": ""}


def ended(tmp_path, variables, **own):
    command = ["bash", str(JOB), "--config", "my.yaml"]
    return subprocess.run(
        command, cwd=tmp_path, env=variables | own, capture_output=True, text=True, timeout=30, check=False
    )


@pytest.mark.parametrize(
    ("status", "line", "again"),
    [
        (0, "", ""),
        (2, "slurm.sh: refused; the line above says why\n", ""),
        (
            128,
            "slurm.sh: exit status 128, for what is above; the same command continues from the newest checkpoint\n",
            "",
        ),
        # Slurm signals the tasks alone when it preempts a job with a grace time.
        (143, "", "requeue 4711\n"),
    ],
)
def test_what_becomes_of_the_job_goes_by_the_exit_status(status, line, again, stub, tmp_path):
    done = ended(tmp_path, stub, STATUS=str(status))
    assert (done.returncode, done.stderr, requeued(tmp_path)) == (status, line, again)


def test_a_cancelled_job_is_not_requeued(stub, tmp_path):
    job = subprocess.Popen(["bash", str(JOB)], cwd=tmp_path, env=stub, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while len(list(tmp_path.glob("started?"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    job.send_signal(signal.SIGUSR1)
    job.communicate(timeout=30)
    assert (job.returncode, requeued(tmp_path)) == (138, "")


@pytest.mark.parametrize(
    ("own", "line"),
    [
        ({"SLURM_JOB_ID": ""}, "this is a batch script: sbatch examples/cluster/slurm.sh --config my.yaml"),
        ({"PROJECT": "/nowhere"}, "PROJECT: /nowhere is not the repository; call sbatch in its folder, or set PROJECT"),
        (
            {"SLURM_NTASKS_PER_NODE": "8"},
            "--ntasks-per-node=8: one agent a machine starts all its ranks; leave it at 1",
        ),
    ],
)
def test_refusals_are_one_line(own, line, stub, tmp_path):
    done = ended(tmp_path, stub, **own)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"slurm.sh: error: {line}\n")
