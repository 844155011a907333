"""Plan a run before it costs anything: which layout fits, how fast it will be, and why other layouts are worse."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from megatron_cca.io.outputs import check_writable
from megatron_cca.io.typed_paths import path_option
from megatron_cca.reporting import reported_tool_errors

_EPILOG = """commands (search is meant where none is named):
  search     rank all layouts of a configuration on a cluster
  dry-run    build the real model of any rank of any cluster and count a step of it, on this CPU
  calibrate  measure the device at hand, so that predictions are of it

examples:
  python tools/plan.py --config examples/emu3_8b_cca.yaml --gpus 64 --gpu h100-80gb
  python tools/plan.py dry-run --config runs/plan/plan.yaml --gpus 1024 --gpu h100-80gb
  python tools/plan.py calibrate --config examples/emu3_8b_cca.yaml --output calibration.json
  python tools/plan.py --config examples/emu3_8b_cca.yaml --gpus 512 --gpu h200 --image-grid 90x90 \\
      --vary micro_batch,recompute,reference,precision --output runs/plan

No GPU is needed, and neither checkpoints nor data. tools/plan.py COMMAND --help says what a command takes.
"""
_SEARCH = """Written to the output folder: plan.yaml, the best run's configuration, which training takes as it is;
table.md; plan.png, memory and seconds of the layouts by what they go to; plan.json, every number.

Predictions come from a model of the GPU whose error is stated beside them (±, two standard deviations). It was held
against published runs, none of them of this program: measure your own with tools/plan.py calibrate.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_search(commands)
    _add_dry_run(commands)
    _add_calibrate(commands)
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv and argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        argv = ["search", *argv]
    arguments = parser.parse_args(argv)
    with reported_tool_errors(("matplotlib",), "eval"):
        if arguments.output is not None:
            check_writable(arguments.output)
        arguments.run(arguments)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of every command, which name the run."""
    parser.add_argument("--config", required=True, type=path_option, metavar="FILE", help="the run's YAML file")
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="SECTION.KEY=VALUE",
        action="append",
        default=[],
        help="override a key of the configuration; may be repeated",
    )


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that give the length of the rows."""
    parser.add_argument(
        "--image-grid",
        metavar="HxW",
        help="visual tokens of an image (default: the model's own grid, or 90x90, 720 x 720 pixels of Emu3)",
    )
    parser.add_argument(
        "--caption-tokens", type=int, default=128, metavar="N", help="of the longest caption (default 128)"
    )


def _add_search(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "search",
        help="rank all layouts of a configuration on a cluster",
        epilog=_SEARCH,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run_options(parser)
    parser.add_argument("--gpus", required=True, type=int, metavar="N", help="GPUs of the whole job")
    parser.add_argument("--gpu", required=True, metavar="NAME", help="their kind, such as h100-80gb")
    parser.add_argument(
        "--nodes-of", dest="gpus_per_node", type=int, metavar="N", help="GPUs that NVLink connects (default 8)"
    )
    add_image_options(parser)
    parser.add_argument(
        "--vary",
        metavar="NAME,...",
        help="what may be changed beside the layout: micro_batch, recompute, optimizer, reference, precision, cached "
        "(default: the first four)",
    )
    parser.add_argument("--calibration", type=path_option, metavar="FILE", help="what tools/plan.py calibrate wrote")
    parser.add_argument("--top", type=int, default=10, metavar="N", help="layouts to show (default 10)")
    parser.add_argument(
        "--output", type=path_option, metavar="DIR", help="an empty or new folder (default: print only)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a former plan in --output, nothing else")
    parser.set_defaults(run=_search)


def _add_dry_run(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "dry-run",
        help="build the real model of any rank of any cluster and count a step of it, on this CPU",
        epilog="Process groups are fake and tensors have no memory; everything else is training's own code. What "
        "training would refuse on that cluster is refused here, in the same words; so is a rank that does not fit.",
    )
    add_run_options(parser)
    parser.add_argument("--gpus", required=True, type=int, metavar="N", help="GPUs of the whole job, up to 16,384")
    parser.add_argument("--gpu", metavar="NAME", help="their kind (default: count as a run on CPUs would)")
    parser.add_argument("--rank", type=int, metavar="R", help="which to be (default: the one that should hold most)")
    add_image_options(parser)
    parser.add_argument("--output", type=path_option, metavar="FILE", help="a JSON file with all numbers")
    parser.add_argument("--overwrite", action="store_true", help="replace the file")
    parser.set_defaults(run=_dry_run)


def _add_calibrate(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "calibrate",
        help="measure the device at hand, so that predictions are of it",
        epilog="Takes one device, runs a few steps of the configuration's model with two and four layers on random "
        "tokens, and writes what predictions need and how far they are off. Links between GPUs are not measured.",
    )
    add_run_options(parser)
    parser.add_argument("--gpu", metavar="NAME", help="what the device is nearest to (default: it says so itself)")
    add_image_options(parser)
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="of each short run (default 5)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--output", required=True, type=path_option, metavar="FILE", help="a JSON file, for --calibration"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the file")
    parser.set_defaults(run=_calibrate)


def _settings(kind: type, arguments: argparse.Namespace) -> Any:
    """Return settings of a class ``kind`` from the options with the names of its fields."""
    return kind(**{field.name: getattr(arguments, field.name) for field in fields(kind)})


# Each command imports its code late, so that --help is fast.
def _search(arguments: argparse.Namespace) -> None:
    from megatron_cca.lab.planner.program import PlanSettings, run_search

    run_search(_settings(PlanSettings, arguments))


def _dry_run(arguments: argparse.Namespace) -> None:
    from megatron_cca.lab.planner.dry_run_program import DryRunSettings, run_dry

    run_dry(_settings(DryRunSettings, arguments))


def _calibrate(arguments: argparse.Namespace) -> None:
    from megatron_cca.lab.planner.program import CalibrateSettings, run_calibrate

    run_calibrate(_settings(CalibrateSettings, arguments))


if __name__ == "__main__":
    main()
