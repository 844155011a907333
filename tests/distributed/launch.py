"""Start worker functions on several gloo ranks, with a time limit and a free port."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORKERS = Path(__file__).with_name("workers.py")


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"}


def torchrun(ranks: int, *arguments: str, cwd: Path, timeout: float = 240) -> subprocess.CompletedProcess:
    """Run a script under torchrun exactly as a user types it, on a free port."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *arguments]
    return subprocess.run(
        command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=timeout, check=False
    )


def run_workers(ranks: int, worker: str, settings: dict, folder: Path, timeout: float = 240) -> dict:
    """Call ``workers.<worker>(settings)`` on every rank; returns what rank 0 answered."""
    folder.mkdir(parents=True, exist_ok=True)
    request, answer = folder / f"{worker}_{ranks}.json", folder / f"{worker}_{ranks}_answer.json"
    request.write_text(json.dumps(settings))
    done = torchrun(ranks, str(WORKERS), worker, str(request), str(answer), cwd=folder, timeout=timeout)
    assert done.returncode == 0, f"{worker} on {ranks} ranks failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return json.loads(answer.read_text())
