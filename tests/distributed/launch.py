"""Start worker functions on several gloo ranks, with a time limit and a free port."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_RUNS = itertools.count()


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"}


def torchrun(ranks: int, *arguments: str, cwd: Path, timeout: float = 240) -> subprocess.CompletedProcess:
    """Run a script under torchrun exactly as a user types it, on a free port."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *arguments]
    return subprocess.run(
        command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=timeout, check=False
    )


# Forked from one server that has imported Megatron-Core already: importing it costs more than most tests, and forked
# ranks share its memory.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["tests.distributed.workers"])


def run_tool(script: Path, *arguments: object, cwd: Path, timeout: float = 120) -> subprocess.CompletedProcess:
    """Run a program of ours on one process as ``python SCRIPT ARGUMENTS`` does, but forked from the same server."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / stream for stream in ("out", "err")]
        job = _SERVER.Process(
            target=_program, args=(str(script), list(map(str, arguments)), str(cwd), *map(str, files))
        )
        job.start()
        job.join(timeout)
        if job.exitcode is None:
            job.kill()
            job.join()
            raise subprocess.TimeoutExpired(str(script), timeout)
        return subprocess.CompletedProcess(
            [str(script), *arguments], job.exitcode, *(file.read_text() for file in files)
        )


def _program(script: str, arguments: list[str], cwd: str, *files: str) -> None:
    for descriptor, file in zip((1, 2), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ |= environment()
    os.chdir(cwd)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
    sys.stdout.flush()


def run_workers(ranks: int, worker: str, settings: dict, folder: Path, timeout: float = 240) -> dict:
    """Call ``workers.<worker>(settings)`` on every rank; returns what rank 0 answered."""
    from tests.distributed import workers

    folder.mkdir(parents=True, exist_ok=True)
    number = next(_RUNS)
    answer = folder / f"answer{number}.json"
    arguments = (ranks, str(folder / f"rendezvous{number}"), str(answer))
    jobs = [
        _SERVER.Process(target=workers.rank_main, args=(worker, settings, rank, *arguments)) for rank in range(ranks)
    ]
    for job in jobs:
        job.start()
    deadline = time.monotonic() + timeout
    while any(job.is_alive() for job in jobs) and not any(job.exitcode for job in jobs):
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    outcome = [job.exitcode for job in jobs]
    for job in jobs:
        job.kill()
        job.join()
    errors = "\n".join(path.read_text() for path in sorted(folder.glob(f"{answer.name}.rank*")))
    assert outcome == [0] * ranks, f"{worker} on {ranks} ranks ended with {outcome} (None: still running):\n{errors}"
    return json.loads(answer.read_text())
