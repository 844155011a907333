"""Run a study: compare methods at equal budget over several seeds. It turns one YAML file into a table and plots."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_cca.errors import UserError
from megatron_cca.io.outputs import check_writable
from megatron_cca.io.typed_paths import path_option
from megatron_cca.reporting import reported_tool_errors

_EPILOG = """example:
  python tools/study.py --study examples/studies/figure4.yaml --workers 2

The same command goes on where it was interrupted. Studies with the same --output share their runs. Under torchrun all
processes do each run together, laid out as the file's parallel keys say. examples/studies/README.md says what a study's
file holds.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, do the runs that are missing, and write the results."""
    arguments = _parser().parse_args(argv)
    with reported_tool_errors(("sklearn", "matplotlib", "torch_fidelity"), "eval"):
        if arguments.workers < 1:
            raise UserError(f"--workers: must be 1 or more, found {arguments.workers}")
        check_writable(arguments.output)
        # Import late, so that errors in the options above appear fast.
        from megatron_cca.lab.studies.program import run_study

        run_study(arguments.study, arguments.output, arguments.workers, arguments.device)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--study", required=True, type=path_option, metavar="FILE", help="the YAML file of the study")
    parser.add_argument(
        "--output",
        type=path_option,
        default=Path("runs/studies"),
        metavar="DIR",
        help="folder of all runs and results (default runs/studies)",
    )
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes that do runs side by side (default 1)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser


if __name__ == "__main__":
    main()
