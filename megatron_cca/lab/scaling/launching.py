"""A point as a torchrun job of its own on this machine: its start, its timeout, and the end of all its processes."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from megatron_cca import platform
from megatron_cca.errors import UserError
from megatron_cca.io.typed_paths import retyped
from megatron_cca.lab.scaling.points import LOGS, write_failed
from megatron_cca.lab.scaling.settings import OPTION
from megatron_cca.lab.scaling.sweep import Task
from megatron_cca.signals import launcher_environment

# Holds the process id of the sweep. A point ends with its sweep.
PARENT = "MEGATRON_CCA_SWEEP_PROCESS"
_TOLD = re.compile(r"megatron_cca: error: (.*)|.*?(\w*OutOfMemoryError: .*)")


def run_point(
    task: Task, sweep: Path, output: Path, script: Path, device: platform.DeviceChoice, timeout: float
) -> None:
    """Start the job and wait until it ends.

    The task has a record afterwards in any case.

    Args:
        task: a task of the sweep.
        sweep: the sweep's file.
        output: the sweep's folder.
        script: the program whose command ``point`` measures the point.
        device: auto, cpu or cuda.
        timeout: the longest duration of the job in seconds.
    """
    log = output / LOGS / f"{task.key}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={task.num_gpus}"]
    command += [str(script), "point", OPTION, retyped(sweep), "--output", retyped(output)]
    command += ["--point", task.title, "--device", device]
    # The folder takes all temporary files of a killed job with it.
    with TemporaryDirectory(prefix="megatron_cca_sweep_") as scratch, log.open("wb") as file:
        job = subprocess.Popen(  # noqa: S603 - our own program, no shell
            command, stdout=file, stderr=subprocess.STDOUT, env=_environment(scratch), start_new_session=True
        )
        try:
            status = job.wait(timeout)
        except subprocess.TimeoutExpired:
            write_failed(output, task, f"not done after {timeout:.0f} s; the sweep's timeout_seconds")
            return
        finally:
            _end(job)
    reason = _reason(log)
    write_failed(output, task, f"{reason}; see {log}" if reason else f"ended with status {status}; see {log}")


def _environment(scratch: str) -> dict[str, str]:
    """Return the environment of the job.

    It sets the number of threads as torchrun would, without torchrun's warning.
    """
    own = {"TMPDIR": scratch, PARENT: str(os.getpid())}
    return {"OMP_NUM_THREADS": "1", **os.environ, **launcher_environment(), **own}


def _end(job: subprocess.Popen, polite_seconds: float = 15) -> None:
    """End a job's processes if any are left.

    torchrun starts its ranks in sessions of their own.

    Args:
        job: the process of torchrun.
        polite_seconds: seconds between SIGTERM and SIGKILL.
    """
    if job.poll() is not None:
        return
    with_children = [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]
    job.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(with_children, timeout=polite_seconds)
    for process in alive:
        process.kill()
    job.wait()


def _reason(log: Path) -> str | None:
    """Return the job's own error message from its log; None if there is none."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    told = [found for line in lines if (found := _TOLD.match(line))]
    return next((found[1] or found[2] for found in told), None)


def leave_with_the_sweep() -> None:
    """Watch the sweep that started this process, and end this process soon after it.

    In a job of another launcher it does nothing.
    """
    parent = os.environ.get(PARENT)
    if parent is None:
        return
    if not parent.isdecimal():
        raise UserError(
            f"{PARENT}: must be the number of a process, found {parent!r}; unset it, a sweep sets it itself"
        )
    threading.Thread(target=_watch, args=(int(parent),), daemon=True).start()


def _watch(parent: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        sweep = psutil.Process(parent)
        while sweep.is_running() and sweep.status() != psutil.STATUS_ZOMBIE:
            time.sleep(1)
    os._exit(1)
