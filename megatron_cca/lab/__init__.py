"""Code around a training job: evaluation, studies, planner, scaling, reference bias. Only the programs import it.

Here: its tables, and the folders of its reports.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tabulate import SEPARATING_LINE, DataRow, Line, TableFormat, tabulate

from megatron_cca.io.output_folders import check_output, claimed

# The folder that a report grows in, inside its output folder.
PARTIAL = ".partial"
_ROW = DataRow("| ", " | ", " |")

Cells = Sequence[str]


@contextmanager
def reserved_folder(output: Path, files: Collection[str], *, overwrite: bool) -> Iterator[None]:
    """Reserve the folder for a report while the context is open.

    It opens before the work and closes after the last file.

    Args:
        output: the folder.
        files: names of the files that a former report may have.
        overwrite: whether to replace a former report.

    Raises:
        UserError: the folder holds something that must not be replaced, or another process writes there.
    """
    with claimed(output):
        check_output(output, files, {PARTIAL}, overwrite=overwrite)
        yield


def markdown_table(header: Cells, rows: Sequence[Cells], *, first_number: int | None = None) -> str:
    """Return a Markdown table whose cells have no padding.

    It is for files. A change of one cell then changes one line.

    Args:
        header: names of the columns.
        rows: rows of the same length; a ``|`` is escaped.
        first_number: the first column of numbers, which align to the right; None if there are no numbers.
    """
    form = TableFormat(None, _rule(first_number), None, None, _ROW, _ROW, 0, None)
    return tabulate(list(map(_escaped, rows)), _escaped(header), form, stralign=None, disable_numparse=True)


def padded_table(header: Cells, rows: Sequence[Cells]) -> str:
    """Return a Markdown table whose columns also line up on a terminal.

    Its arguments are those of :func:`markdown_table`.
    """
    form = TableFormat(None, Line("| ", "-", " | ", " |"), None, None, None, _ROW, 0, None)
    # The header is a row, because tabulate makes columns wider than their headers.
    lines = [_escaped(header), SEPARATING_LINE, *map(_escaped, rows)]
    return tabulate(lines, tablefmt=form, stralign="left", disable_numparse=True)


def _escaped(cells: Cells) -> list[str]:
    return [cell.replace("|", r"\|") for cell in cells]


def _rule(first_number: int | None) -> Callable[[Sequence[int], Sequence[str]], str]:
    def rule(widths: Sequence[int], _alignments: Sequence[str]) -> str:
        texts = len(widths) if first_number is None else first_number
        return f"| {' | '.join(['---'] * texts + ['---:'] * (len(widths) - texts))} |"

    return rule
