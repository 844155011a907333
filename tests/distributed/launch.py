"""Start worker functions on several gloo ranks, and programs as users start them, with a time limit and a free port."""

from __future__ import annotations

import itertools
import json
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.distributed.pool import POOL, SERVER

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "pretrain_cca_emu3.sh"
_RUNS = itertools.count()
# Seconds after which a job is taken to hang: far more than any needs, as a busy machine can be ten times slower.
LIMIT = 600


def environment() -> dict[str, str]:
    """The variables of every program that a test starts."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"}


def run_workers(ranks: int, worker: str, settings: dict, folder: Path, timeout: float = LIMIT) -> dict:
    """Call ``workers.<worker>(settings)`` on every rank; returns what rank 0 answered.

    A worker of ``logits_workers.py`` and the like is ``logits_workers.<function>``.
    """
    from tests.distributed.ranks import WorkerJob

    folder.mkdir(parents=True, exist_ok=True)
    rendezvous = str(folder / f"rendezvous{next(_RUNS)}")
    jobs = [WorkerJob(worker, settings, rank, ranks, rendezvous) for rank in range(ranks)]
    return json.loads(POOL.run(worker, jobs, timeout)[0])


def run_tool(script: Path, *arguments: object, cwd: Path, timeout: float = LIMIT) -> subprocess.CompletedProcess:
    """Call ``main`` of a program of ours with these arguments, in a process that has imported everything already."""
    from tests.distributed.ranks import ProgramJob

    words = list(map(str, arguments))
    with tempfile.TemporaryDirectory() as folder:
        files = (f"{folder}/out", f"{folder}/err")
        (status,) = POOL.run(
            Path(script).name, [ProgramJob(str(script), words, str(cwd), files, environment())], timeout
        )
        return subprocess.CompletedProcess([str(script), *words], status, *(Path(file).read_text() for file in files))


def typed(*command: object, cwd: Path, timeout: float = LIMIT, **variables: str) -> subprocess.CompletedProcess:
    """Run a command line exactly as a user types it, in a process that has imported nothing yet.

    Args:
        variables: of its environment, beside this one's.
    """
    return subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=environment() | variables,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def torchrun(ranks: int, *arguments: object, cwd: Path, timeout: float = LIMIT) -> subprocess.CompletedProcess:
    """Run a script under torchrun exactly as a user types it, on a free port."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return typed(*command, *arguments, cwd=cwd, timeout=timeout)


def start_tool(script: Path, *arguments: object, cwd: Path, log: Path, **variables: object):
    """Start a program in a process of its own, forked from the server; returns the process.

    It may be killed, and may patch what it likes. Its output goes to ``<log>.out`` and ``<log>.err``.

    Args:
        variables: of the environment, such as a rank's.
    """
    files = [f"{log}.out", f"{log}.err"]
    own = {name: str(value) for name, value in variables.items()}
    job = SERVER.Process(target=_program, args=(str(script), list(map(str, arguments)), str(cwd), own, *files))
    job.start()
    return job


def run_alone(script: Path, *arguments: object, cwd: Path, timeout: float = LIMIT) -> subprocess.CompletedProcess:
    """:func:`start_tool` and wait for its end."""
    with tempfile.TemporaryDirectory() as folder:
        job = start_tool(script, *arguments, cwd=cwd, log=Path(folder) / "log")
        job.join(timeout)
        if job.exitcode is None:
            end_job([job])
            raise subprocess.TimeoutExpired(str(script), timeout)
        return subprocess.CompletedProcess(
            [str(script), *arguments], job.exitcode, *(Path(folder, f"log.{end}").read_text() for end in ("out", "err"))
        )


def start_job(ranks: int, script: Path, *arguments: object, cwd: Path, **variables: object) -> list:
    """Start a program of ours on several ranks, forked, as a launcher does; their output is in ``<cwd>/rank*``.

    Args:
        variables: of the environment.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    job = {"WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **variables}
    return [
        start_tool(script, *arguments, cwd=cwd, log=cwd / f"rank{rank}", RANK=rank, LOCAL_RANK=rank, **job)
        for rank in range(ranks)
    ]


def ended(jobs: list, timeout: float = LIMIT) -> list[int | None]:
    """The exit codes of a job's ranks, which end by themselves within so many seconds; None for one that does not.

    None of them runs any longer.
    """
    deadline = time.monotonic() + timeout
    for job in jobs:
        job.join(max(0.0, deadline - time.monotonic()))
    codes = [job.exitcode for job in jobs]
    end_job(jobs)
    return codes


def end_job(jobs: list) -> None:
    """Kill what is left of a job."""
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
