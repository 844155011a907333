"""Start worker functions on several gloo ranks, with a time limit and a free port."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_RUNS = itertools.count()
# Seconds after which a job is taken to hang: far more than any needs, as a busy machine can be ten times slower.
LIMIT = 600


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"}


def torchrun(ranks: int, *arguments: str, cwd: Path, timeout: float = LIMIT) -> subprocess.CompletedProcess:
    """Run a script under torchrun exactly as a user types it, on a free port."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *arguments]
    return subprocess.run(
        command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=timeout, check=False
    )


# Forked from one server that has imported Megatron-Core already, and what else is slow to import: that costs more than
# most tests, and forked ranks share its memory.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        # First: it installs the platform, before the others import Megatron-Core.
        "tests.distributed.ranks",
        "tests.distributed.llamagen_workers",
        "tests.distributed.logits_workers",
        "tests.distributed.timing_workers",
        "tests.distributed.workers",
        "matplotlib.pyplot",
        "nvidia.dali.fn",
        "sklearn.datasets",
        "sklearn.svm",
        "transformers",
    ]
)


def run_tool(script: Path, *arguments: object, cwd: Path, timeout: float = LIMIT) -> subprocess.CompletedProcess:
    """Run a program of ours on one process as ``python SCRIPT ARGUMENTS`` does, but forked from the same server."""
    with tempfile.TemporaryDirectory() as folder:
        job = start_tool(script, *arguments, cwd=cwd, log=Path(folder) / "log")
        job.join(timeout)
        if job.exitcode is None:
            job.kill()
            job.join()
            raise subprocess.TimeoutExpired(str(script), timeout)
        return subprocess.CompletedProcess(
            [str(script), *arguments], job.exitcode, *(Path(folder, f"log.{end}").read_text() for end in ("out", "err"))
        )


def start_tool(script: Path, *arguments: object, cwd: Path, log: Path, **variables: object):
    """As :func:`run_tool`, but returns the started process; its output goes to ``<log>.out`` and ``<log>.err``.

    Args:
        variables: of the environment, such as a rank's.
    """
    files = [f"{log}.out", f"{log}.err"]
    own = {name: str(value) for name, value in variables.items()}
    job = _SERVER.Process(target=_program, args=(str(script), list(map(str, arguments)), str(cwd), own, *files))
    job.start()
    return job


def start_job(ranks: int, script: Path, *arguments: object, cwd: Path) -> list:
    """Start a program of ours on several ranks, forked, as a launcher does; their output is in ``<cwd>/rank*``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    job = {"WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        start_tool(script, *arguments, cwd=cwd, log=cwd / f"rank{rank}", RANK=rank, LOCAL_RANK=rank, **job)
        for rank in range(ranks)
    ]


def end_job(jobs: list) -> None:
    """Kill what is left of it."""
    for job in jobs:
        job.kill()
        job.join()


def _program(script: str, arguments: list[str], cwd: str, variables: dict[str, str], *files: str) -> None:
    for descriptor, file in zip((1, 2), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.environ |= environment() | variables
    os.chdir(cwd)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
    sys.stdout.flush()


def _tell_where_they_stand(jobs: list) -> None:
    hanging = [job for job in jobs if job.is_alive()]
    for job in hanging:
        os.kill(job.pid, signal.SIGUSR1)
    if hanging:
        time.sleep(1)


def run_workers(ranks: int, worker: str, settings: dict, folder: Path, timeout: float = LIMIT) -> dict:
    """Call ``workers.<worker>(settings)`` on every rank; returns what rank 0 answered.

    A worker of ``logits_workers.py`` and the like is ``logits_workers.<function>``.
    """
    from tests.distributed.ranks import rank_main

    folder.mkdir(parents=True, exist_ok=True)
    number = next(_RUNS)
    answer = folder / f"answer{number}.json"
    arguments = (ranks, str(folder / f"rendezvous{number}"), str(answer))
    jobs = [_SERVER.Process(target=rank_main, args=(worker, settings, rank, *arguments)) for rank in range(ranks)]
    for job in jobs:
        job.start()
    deadline = time.monotonic() + timeout
    while any(job.is_alive() for job in jobs) and not any(job.exitcode for job in jobs):
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    outcome = [job.exitcode for job in jobs]
    _tell_where_they_stand(jobs)
    for job in jobs:
        job.kill()
        job.join()
    errors = "\n".join(path.read_text() for path in sorted(folder.glob(f"{answer.name}.rank*")))
    assert outcome == [0] * ranks, f"{worker} on {ranks} ranks ended with {outcome} (None: still running):\n{errors}"
    return json.loads(answer.read_text())
