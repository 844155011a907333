"""The file of results: one JSON object on each line, written as soon as it is known, and why it may lack figures."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Line = dict[str, Any]

MEASURED, OUT_OF_MEMORY, REFUSED, MISSING = "measured", "out of memory", "refused", "not installed"
FAILED, OUT_OF_TIME = "failed", "out of time"
PASSED, SKIPPED = "passed", "skipped"
REHEARSAL = "a rehearsal on a CPU with tiny sizes; it says nothing about a GPU"


class MissingPackage(Exception):
    """A peer that is not installed; the message names it."""


class DeviceMemory(Exception):
    """Too little memory, where a library has caught the error already."""


def append(path: Path, line: Line) -> None:
    """Write a line and wait until it is on the disk."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(paths: Iterable[Path]) -> list[Line]:
    """Read the lines of several files, in order.

    Of lines with the same key the last one counts, in the place of the first. A last line that a crash cut off is
    ignored.

    Raises:
        SystemExit: a missing file, or a line that this program did not write.
    """
    found: dict[tuple, Line] = {}
    for path in paths:
        if not path.is_file():
            raise SystemExit(f"{path}: no such file; give the --output of an earlier call")
        texts = path.read_text(errors="replace").splitlines(keepends=True)
        for number, text in enumerate(texts, start=1):
            line = _parsed(text)
            if line is not None:
                found[key(line)] = line
            elif number < len(texts) or text.endswith("\n"):
                raise SystemExit(f"{path}, line {number}: not a line that benchmarks/gpu.py writes")
    return list(found.values())


def end_whole_lines(path: Path) -> None:
    """Remove an unfinished last line, which a crash may have left."""
    if path.is_file():
        whole = path.read_bytes()
        end = whole.rfind(b"\n") + 1
        if end < len(whole):
            path.write_bytes(whole[:end])


def key(line: Line) -> tuple:
    """Return the key of a line.

    Two lines with the same key measure the same thing.
    """
    return (line["part"], line["setting"], line["about"]["card"], tuple(line["overrides"]), "rehearsal" in line)


def spread_ms(seconds: Sequence[float]) -> dict[str, float]:
    """Return the median, the least and the most in milliseconds, as a line has them."""
    return {
        "median": 1e3 * statistics.median(seconds),
        "least": 1e3 * min(seconds),
        "most": 1e3 * max(seconds),
    }


def milliseconds(line: Line) -> dict[str, float]:
    """Return ``median``, ``least`` and ``most`` of a measured line.

    The result is empty for a line without times.
    """
    figures = line.get("figures", {})
    return figures.get("ms") or figures.get("total_ms") or {}


def peak_bytes(line: Line) -> int | None:
    """Return the peak of memory in bytes.

    For a step it is all memory. For the head it is the memory beyond its inputs.
    """
    figures = line.get("figures", {})
    return figures.get("peak_bytes", figures.get("extra_bytes"))


def beside(line: Line, baseline: Line) -> dict[str, Any]:
    """Return time and memory as shares of a baseline's."""
    found: dict[str, Any] = {"baseline": baseline["setting"]}
    ours, theirs = milliseconds(line), milliseconds(baseline)
    if ours and theirs:
        found["time"] = ours["median"] / theirs["median"]
    held, held_there = peak_bytes(line), peak_bytes(baseline)
    if held and held_there:
        found["memory"] = held / held_there
    return found


def short(line: Line) -> str:
    """Return the figures in a few words."""
    figures, spread = line.get("figures", {}), milliseconds(line)
    found = [f"{spread['median']:.4g} ms"] if spread else []
    found += [f"{figures['tflops']:.3g} TFLOP/s"] if "tflops" in figures else []
    found += [f"MFU {figures['mfu']:.1%}"] if figures.get("mfu") else []
    held = peak_bytes(line)
    return ", ".join([*found, f"{held / 2**30:.2f} GiB"] if held else found)


def _parsed(text: str) -> Line | None:
    try:
        line = json.loads(text)
        key(line)
    except (ValueError, KeyError, TypeError):
        return None
    return line
