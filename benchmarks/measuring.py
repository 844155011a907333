"""Functions that the benchmarks share: a fresh process for each measurement, and the machine's name."""

from __future__ import annotations

import json
import os
import platform as host
import subprocess
import sys
from pathlib import Path


def in_fresh_process(program: str, settings: dict) -> dict:
    """Run ``program --measure SETTINGS`` and return the JSON object on its last line of output.

    If the kernel ends it for lack of memory, the result is ``{"out_of_memory": True}``. Any other failure ends the
    benchmark with the program's own message.
    """
    command = [sys.executable, program, "--measure", json.dumps(settings)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)  # noqa: S603 - our own script, no shell
    if done.returncode in (-9, 137):
        return {"out_of_memory": True}
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed")
    return json.loads(done.stdout.splitlines()[-1])


def machine(device: str) -> str:
    """Describe the machine in words, for the head of a table."""
    import torch

    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, Python {host.python_version()}, torch {torch.__version__}"
    name = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        host.machine(),
    )
    return f"{os.cpu_count()} cores of {name}, Python {host.python_version()}, torch {torch.__version__}"
