"""Write one HTML file about a run: configuration, curves, pictures, evaluation tables, prediction and events."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_cca.io.output_folders import check_file
from megatron_cca.io.outputs import check_writable, file_system_errors, write_text
from megatron_cca.lab.run_report import ReportOptions
from megatron_cca.programs.parsing import parse
from megatron_cca.reporting import reported_tool_errors

_EXAMPLES = """examples:
  megatron-cca report runs/cca --output runs/cca/report.html
  megatron-cca report runs/cca --evaluation runs/evaluation --gpu h100-80gb --output cca.html

The file holds its pictures, and needs neither a server nor a network nor scripts.
"""

OPTIONS = ReportOptions


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, read the run, and write the page."""
    given = parse(OPTIONS, argv, __doc__, _EXAMPLES)
    with reported_tool_errors(("matplotlib", "jinja2")):
        check_writable(given.output)
        check_file(given.output, overwrite=given.overwrite)
        # Imported late: --help need not wait for it.
        from megatron_cca import platform

        platform.install("cpu")
        # These import Megatron-Core, before which the platform must be installed.
        from megatron_cca.lab.run_report.page import page

        text = page(given)
        with file_system_errors(given.output):
            write_text(given.output, text)
        print(f"wrote {given.output} ({len(text.encode()) / 1e6:.1f} MB)")
