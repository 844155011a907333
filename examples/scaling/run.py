"""Weak and strong scaling as one command: measure what this machine allows, plan the rest, draw the curve."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_cca.io.outputs import check_writable
from megatron_cca.io.paths import path_option
from megatron_cca.reporting import reported_tool_errors

HERE = Path(__file__).resolve().parent
_EPILOG = """commands (run is meant where none is named):
  run    measure every point in a torchrun job of its own on this machine, then write table and picture
  list   name the points of a sweep, for a cluster's launcher
  point  measure one point inside a job that torchrun, Slurm or Kubernetes has started

examples:
  python examples/scaling/run.py --sweep examples/scaling/tiny.yaml --output runs/scaling
  torchrun --nnodes 2 --nproc_per_node 8 ... examples/scaling/run.py point \\
      --sweep examples/scaling/emu3_8b.yaml --output runs/scaling_8b --point weak-16-tp4
  python examples/scaling/run.py --sweep examples/scaling/emu3_8b.yaml --output runs/scaling_8b --collect
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    run = _add(commands, "run", "measure, plan, and write table and picture")
    run.add_argument("--retry-failed", action="store_true", help="run points again that failed before")
    run.add_argument("--collect", action="store_true", help="start no point: take what `point` has left in --output")
    _add(commands, "list", "name the points of a sweep")
    point = _add(commands, "point", "measure one point inside a running job")
    point.add_argument("--point", metavar="NAME", help="from `list` (default: the only one of this job's size)")
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv and argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        argv = ["run", *argv]
    arguments = parser.parse_args(argv)
    with reported_tool_errors(("matplotlib",)):
        if arguments.command != "list":
            check_writable(arguments.output)
        _do(arguments)


def _add(commands: argparse._SubParsersAction, name: str, about: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=about, description=about[:1].upper() + about[1:])
    parser.add_argument(
        "--sweep", type=path_option, default=HERE / "tiny.yaml", metavar="FILE", help="default: tiny.yaml"
    )
    parser.add_argument(
        "--output", type=path_option, default=Path("runs/scaling"), metavar="DIR", help="default: runs/scaling"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser


def _do(arguments: argparse.Namespace) -> None:
    # Imported late: --help need not wait for it.
    from megatron_cca.lab.scaling import program

    sweep, output, device = arguments.sweep, arguments.output, arguments.device
    if arguments.command == "list":
        program.list_points(sweep, output, device)
    elif arguments.command == "point":
        program.measure_point(sweep, output, arguments.point, device)
    else:
        options = {"retry_failed": arguments.retry_failed, "collect": arguments.collect}
        program.run_sweep(program.RunSettings(sweep, output, Path(__file__).resolve(), device, **options))


if __name__ == "__main__":
    main()
