"""Two machines, each with an agent of its own: the losses of one machine, restarts, and the loss of a machine."""

import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import psutil
import pytest

from tests.distributed.launch import ROOT, SCRIPT, ended, environment, start_job
from tests.distributed.test_faults import TP2, arguments, events, injected, losses, stderr
from tests.references.two_nodes import namespaces_allowed, two_nodes

pytestmark = pytest.mark.full

AGENT = ROOT / "examples" / "cluster" / "agent.py"
# Five programs import Megatron-Core at once; how long that takes depends on the machine.

NETWORK = "two_namespaces" if namespaces_allowed() else "one_namespace_since_two_are_not_allowed"


@pytest.fixture(params=[NETWORK])
def nodes():
    with two_nodes() as both:
        yield both


@contextmanager
def agents(nodes, *command, cwd):
    """One agent a node; their output is in ``<cwd>/node*``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    try:
        for node in nodes:
            rendezvous = [f"--rdzv_endpoint={nodes[0].address}:{port}", f"--rdzv_conf=is_host={int(node.number == 0)}"]
            agent = [sys.executable, str(AGENT), "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", *rendezvous]
            with (cwd / f"node{node.number}").open("w") as log:
                started.append(
                    subprocess.Popen(
                        [*node.enter, *agent, f"--local_addr={node.address}", *map(str, command)],
                        cwd=cwd,
                        env=environment() | node.variables,
                        stdout=log,
                        stderr=log,
                    )
                )
        yield started
    finally:
        for agent in started:
            kill_machine(agent)


def kill_machine(agent):
    """What a power cut does: the agent and its ranks are gone at once, without a word."""
    try:
        everything = [psutil.Process(agent.pid), *psutil.Process(agent.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in everything:
        process.suspend()
    for process in everything:
        process.kill()
    agent.wait()


def said(cwd, number):
    return (cwd / f"node{number}").read_text()


def outcome(started, cwd, seconds=400):
    deadline = time.monotonic() + seconds
    try:
        return [agent.wait(max(0.1, deadline - time.monotonic())) for agent in started]
    except subprocess.TimeoutExpired:
        pytest.fail(f"still running after {seconds} s:\n{said(cwd, 0)}\n{said(cwd, 1)}")


@pytest.fixture(scope="module")
def on_one_machine(digit_shards, tmp_path_factory):
    """The losses of two ranks on one machine, uninterrupted."""
    folder = tmp_path_factory.mktemp("one_machine")
    jobs = start_job(2, SCRIPT, *arguments(digit_shards, **TP2), cwd=folder)
    assert ended(jobs) == [0, 0], stderr(folder, 0)
    return losses(folder)


KILLED_ONCE = """
    import os, signal
    import megatron_cca.training.loop as loop
    train_step = loop.train_step
    def killed(run):
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and run.iteration == 5:
            # Step 4 is saved in the background. However slow the disk is, it is there before the rank dies.
            run.saver.finish()
            if os.environ["GROUP_RANK"] == "1":
                os.kill(os.getpid(), signal.SIGKILL)
        return train_step(run)
    loop.train_step = killed
"""


def test_two_machines_have_the_losses_of_one_also_after_a_restart(nodes, on_one_machine, digit_shards, tmp_path):
    """Tensor parallelism across the machines; a rank of one is killed at step 5, and both begin anew at step 4."""
    script = injected(tmp_path, KILLED_ONCE)
    options = arguments(digit_shards, **TP2, **{"training.save_interval": 2})
    with agents(nodes, "--max_restarts=1", script, *options, cwd=tmp_path) as started:
        assert outcome(started, tmp_path) == [0, 0], said(tmp_path, 0) + said(tmp_path, 1)
    assert losses(tmp_path) == pytest.approx(on_one_machine, rel=1e-5)
    resumed = [event for event in events(tmp_path) if event["event"] == "resumed"]
    assert [(event["step"], event["world_size"]) for event in resumed] == [(4, 2)]


def test_the_loss_of_a_machine_ends_the_job_on_the_other(nodes, digit_shards, tmp_path):
    options = arguments(digit_shards, **TP2, **{"training.train_iters": 100000})
    with agents(nodes, SCRIPT, *options, cwd=tmp_path) as started:
        metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 400
        while not metrics.exists() or metrics.read_text().count("\n") < 2:
            assert time.monotonic() < deadline, said(tmp_path, 0)
            time.sleep(0.1)
        kill_machine(started[1])
        assert outcome(started, tmp_path, 120)[0] == 128
    last = said(tmp_path, 0).splitlines()[-1]
    assert last.startswith("agent.py on ")
    assert last.endswith("rank 0 ended with exit status 1") or last.endswith("rank 1 ended with exit status 1")
    assert "closed by peer" in said(tmp_path, 0).lower() or "reset by peer" in said(tmp_path, 0).lower()
