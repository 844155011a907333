"""Functions that the benchmarks share: a fresh process for each measurement, and the machine's name.

Such a process runs the same program with ``--measure SETTINGS``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform as host
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path


def parse_or_measure(parser: argparse.ArgumentParser, measure: Callable[[dict], dict]) -> argparse.Namespace:
    """Return the arguments of the command line. In a measuring process, print the result and end instead.

    Args:
        parser: the benchmark's options.
        measure: maps the settings of :func:`in_fresh_process` to its result.
    """
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(json.loads(arguments.measure))))
        sys.exit()
    return arguments


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
