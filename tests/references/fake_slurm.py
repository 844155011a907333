"""What of Slurm ``examples/cluster/slurm.sh`` meets, on one machine: ``srun``, ``scontrol``, and a job's variables.

As Slurm has it: srun starts a task a node, passes SIGUSR1 on to every process of every task, ends its tasks at SIGTERM,
and exits with the highest status of a task. What it does not know it refuses.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

NODES = ("127.0.0.1", "localhost")


def install(folder: Path) -> dict[str, str]:
    """Put ``srun`` and ``scontrol`` into a folder; returns a job's environment."""
    folder.mkdir(parents=True)
    for name in ("srun", "scontrol"):
        program = folder / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" {name} "$@"\n')
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_NTASKS_PER_NODE": "1",
        "FAKE_SLURM_LOG": str(folder / "scontrol.log"),
    }


def srun(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="srun", allow_abbrev=False)
    for option in ("--nodes", "--ntasks", "--ntasks-per-node", "--wait"):
        parser.add_argument(option, type=int)
    for option in ("--cpu-bind", "--container-image", "--container-mounts", "--container-workdir"):
        parser.add_argument(option)
    for option in ("--label", "--unbuffered"):
        parser.add_argument(option, action="store_true")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    assert (options.nodes, options.ntasks, options.ntasks_per_node) == (len(NODES), len(NODES), 1)
    tasks: list[subprocess.Popen] = []
    signal.signal(signal.SIGUSR1, lambda number, _: _signal_all(tasks, number))
    signal.signal(signal.SIGTERM, lambda *_: _signal_all(tasks, signal.SIGKILL))
    for node in map(str, range(options.nodes)):
        tasks.append(subprocess.Popen(options.command, env={**os.environ, "SLURM_NODEID": node, "SLURM_PROCID": node}))
    codes = [task.wait() for task in tasks]
    return max(128 - code if code < 0 else code for code in codes)


def _signal_all(tasks: list[subprocess.Popen], number: int) -> None:
    import psutil

    for task in tasks:
        with contextlib.suppress(psutil.NoSuchProcess):
            everything = [psutil.Process(task.pid), *psutil.Process(task.pid).children(recursive=True)]
            for process in everything:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)


def scontrol(arguments: list[str]) -> int:
    if arguments[:2] == ["show", "hostnames"] and len(arguments) == 3:
        print("\n".join(NODES))
        return 0
    if arguments[0] == "requeue":
        with Path(os.environ["FAKE_SLURM_LOG"]).open("a") as log:
            log.write(" ".join(arguments) + "\n")
        return 0
    return 1


if __name__ == "__main__":
    sys.exit({"srun": srun, "scontrol": scontrol}[sys.argv[1]](sys.argv[2:]))
