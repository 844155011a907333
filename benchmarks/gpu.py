"""All measurements that need a GPU, in calls of some minutes; each result is at once a line of JSON.

.venv/bin/python benchmarks/gpu.py --minutes 9 --output runs/gpu.jsonl

The parts are, in this order: head (log-probabilities at Emu3's vocabulary), tests (pytest tests/gpu), step (a CCA step
of four true-width layers of Emu3-8B, bf16 and FP8, by reference), llamagen (LlamaGen-3B), lora (Emu3-8B with LoRA and a
shared reference), bias (of references in FP8), and plan (the planner against these results). A call continues where the
one before ended. Without a GPU the same parts run with tiny sizes, as a rehearsal. gpu.md has the results.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
# The parts import the other benchmarks and the package from here, from any working directory.
sys.path[:0] = [str(HERE), str(HERE.parent)]

from gpu_parts import lines  # noqa: E402
from gpu_parts.process import module_path  # noqa: E402
from gpu_parts.runner import Runner  # noqa: E402
from gpu_parts.settings import TRAINING, WEIGHTS  # noqa: E402
from gpu_parts.tables import tables  # noqa: E402


def main() -> None:
    """Measure for so many minutes.

    With ``--tables``, print earlier results.
    """
    arguments = _arguments()
    if arguments.tables:
        print(tables(lines.read(arguments.tables)))
        return
    # The processes that it has started end with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("benchmarks/gpu.py: ended by SIGTERM"))
    deadline = time.time() + 60 * arguments.minutes
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    about = _about()
    _say(f"{about['card']}, torch {about['torch']}; {arguments.output}")
    if not about["cuda_visible"]:
        _say(f"no GPU is visible: this is {lines.REHEARSAL}")
    overrides: dict[str, list[str]] = {}
    for part, _, override in (text.partition(":") for text in arguments.set):
        overrides.setdefault(part, []).append(override)
    runner = Runner(arguments.output, about, deadline, overrides, arguments.again, say=_say)
    runner.run(arguments.parts)
    print(f"\n{tables(lines.read([arguments.output]))}" if arguments.output.exists() else "nothing was measured")
    if runner.left_out:
        print("no time was left for these; call again with the same --output:", *runner.left_out, sep="\n- ")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9, help="for all parts of this call (default: %(default)s)")
    parser.add_argument("--parts", nargs="+", choices=list(WEIGHTS), default=list(WEIGHTS), help="default: all")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu.jsonl"), help="results (default: %(default)s)")
    parser.add_argument("--again", action="store_true", help="measure what has a result in --output, too")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="PART:KEY=VALUE", help="of the runs of step, llamagen or lora"
    )
    parser.add_argument("--tables", type=Path, nargs="+", metavar="FILE.jsonl", help="only print what these hold")
    arguments = parser.parse_args()
    if not arguments.minutes > 0:
        parser.error(f"--minutes: must be greater than 0, found {arguments.minutes}")
    for text in arguments.set:
        part, colon, override = text.partition(":")
        if not colon or part not in TRAINING or "=" not in override:
            parser.error(f"--set: {text!r} must be PART:KEY=VALUE, the part one of {', '.join(TRAINING)}")
    return arguments


def _about() -> dict:
    """Return the card and the versions.

    Another process reads them, because this one must hold nothing on the device.
    """
    command = [sys.executable, str(HERE / "gpu_parts" / "worker.py"), "--about"]
    done = subprocess.run(  # noqa: S603 - our own program
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": module_path()}
    )
    if done.returncode:
        sys.exit("benchmarks/gpu.py: torch and this project must be importable")
    return json.loads(done.stdout.splitlines()[-1])


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
