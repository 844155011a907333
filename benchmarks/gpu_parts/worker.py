"""The process of a part: it measures one setting after the other, and each setting has a result in any case."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from importlib import import_module, metadata
from typing import Any

from gpu_parts import settings
from gpu_parts.channel import Channel, task
from gpu_parts.lines import (
    FAILED,
    MEASURED,
    MISSING,
    OUT_OF_MEMORY,
    OUT_OF_TIME,
    REFUSED,
    DeviceMemory,
    MissingPackage,
)

# Each module has measure(values, seconds). It returns figures and may raise.
_MODULES = {
    settings.HEAD: "head",
    **dict.fromkeys(settings.TRAINING, "training"),
    settings.BIAS: "bias",
    settings.PLAN: "planner",
}
# The exit status that asks for a fresh process for the part's other settings.
AGAIN = 75
# The bytes that a setting may leave on the device. Libraries keep workspaces, and a fresh process costs many seconds.
_LEFT_BYTES = 512 << 20


def main() -> None:
    """Measure all settings of the task."""
    todo = task()
    channel = Channel(todo["descriptor"])
    from megatron_cca import platform

    platform.install("auto")
    measure = import_module(f"gpu_parts.{_MODULES[todo['part']]}").measure
    for position, setting in enumerate(todo["settings"]):
        left = todo["deadline"] - time.time()
        if left < setting["seconds"]:
            channel.not_started(setting["name"], f"needs {setting['seconds']:.0f} s, {max(0, left):.0f} s were left")
            continue
        channel.started(setting["name"], setting["limit"])
        values = setting["values"] | {"overrides": setting["values"].get("overrides", []) + todo["overrides"]}
        found = attempt(measure, values, min(left, setting["limit"]))
        channel.result(setting["name"], **found, settings=values)
        if position + 1 < len(todo["settings"]) and not _is_clean(found["status"]):
            sys.stderr.flush()
            os._exit(AGAIN)


def attempt(measure: Callable[[dict, float], dict], values: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Measure a setting; return the status, and figures or the reason why there are none."""
    import torch

    from megatron_cca.errors import UserError, one_line

    started = time.monotonic()
    try:
        figures = measure(values, seconds)
        return {"status": MEASURED, "seconds": time.monotonic() - started, "figures": figures}
    except MissingPackage as error:
        return {"status": MISSING, "reason": str(error)}
    except TimeoutError as error:
        return {"status": OUT_OF_TIME, "reason": str(error)}
    except UserError as error:
        return {"status": REFUSED, "reason": str(error)}
    except BaseException as error:
        traceback.print_exc()
        first = one_line(str(error).strip().partition("\n")[0]) or "no reason given"
        if isinstance(error, torch.OutOfMemoryError | MemoryError | DeviceMemory) or "can't allocate memory" in first:
            return {"status": OUT_OF_MEMORY, "reason": f"out of memory at {_peak_gib():.1f} GiB; {first}"}
        return {"status": FAILED, "reason": f"{type(error).__name__}: {first}"}


def _is_clean(status: str) -> bool:
    """Check whether the device is as the first setting found it."""
    from megatron_cca import platform

    if status in (FAILED, OUT_OF_MEMORY):
        return False
    gc.collect()
    if not platform.current().is_cuda:
        return True
    import torch

    torch.cuda.empty_cache()
    return platform.memory_bytes() < _LEFT_BYTES


def _peak_gib() -> float:
    from megatron_cca import platform

    return platform.peak_memory_bytes() / 2**30


def print_about() -> None:
    """Print the card and the versions as a line of JSON."""
    import torch
    from measuring import machine

    from megatron_cca import platform

    is_cuda = platform.num_devices()[0] == "cuda"
    found = {
        "card": torch.cuda.get_device_name() if is_cuda else machine("cpu").partition(", Python")[0],
        "cuda_visible": is_cuda,
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory if is_cuda else None,
        "driver": _driver() if is_cuda else None,
        "python": sys.version.split()[0],
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        **{name: _version(name) for name in ("transformer-engine", "megatron-core", "triton")},
    }
    print(json.dumps(found))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.split("\n")[0].strip()


if __name__ == "__main__":
    print_about() if sys.argv[1:] == ["--about"] else main()
