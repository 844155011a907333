"""Run a study: methods compared at equal budget over several seeds, from one YAML file to a table and its plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_cca.config import StudyFile
from megatron_cca.io.options import Count, DeviceChoice, Folder, options
from megatron_cca.io.outputs import check_writable
from megatron_cca.programs.parsing import parse
from megatron_cca.reporting import reported_tool_errors

_EPILOG = """example:
  megatron-cca study --study figure4 --workers 2

The same command continues where it was interrupted. Studies with the same --output share their runs. Under torchrun
all processes do each run together, on the layout that the file's parallel keys give. What the file of a study holds
stands in examples/studies/README.md (after an installation below megatron_cca/).
"""


@options
class StudyOptions:
    """The study, and the processes that work on it."""

    study: StudyFile
    """the YAML file of the study, or the name of an example"""
    output: Folder = Path("runs/studies")
    """folder of all runs and results, which studies may share (default runs/studies)"""
    workers: Count = 1
    """number of processes that do runs at the same time"""
    device: DeviceChoice = "auto"
    """auto takes a GPU where there is one"""


OPTIONS = StudyOptions


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, do the missing runs, write the results."""
    given = parse(OPTIONS, argv, __doc__, _EPILOG)
    with reported_tool_errors(("sklearn", "matplotlib", "torch-fidelity")):
        check_writable(given.output)
        # Imported late: --help need not wait for it.
        from megatron_cca.lab.studies.study import run_study

        run_study(given.study, given.output, given.workers, given.device)
