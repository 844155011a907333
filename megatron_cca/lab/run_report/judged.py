"""Tables and pictures of folders that evaluate, study or the demo wrote."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_cca.errors import UserError
from megatron_cca.lab.evaluation.report import TABLE_FILE

_RULE = re.compile(r"\|(\s*:?-+:?\s*\|)+")
_BOLD = re.compile(r"\*\*(.*)\*\*")


@dataclass(frozen=True)
class Cell:
    """A cell of a table, and whether it is bold."""

    text: str
    is_bold: bool


@dataclass(frozen=True)
class Table:
    """A table: its header and its rows."""

    header: list[str]
    rows: list[list[Cell]]


@dataclass(frozen=True)
class Judged:
    """The contents of a folder: text and tables of its ``table.md`` in order, and its pictures."""

    folder: Path
    parts: list[str | Table]
    pictures: list[Path]


def read_judged(folders: Sequence[Path], run: Path) -> list[Judged]:
    """Read the folders that a user named, and those inside the run's own.

    Raises:
        UserError: a folder without a table.
    """
    for folder in folders:
        if not (folder / TABLE_FILE).is_file():
            raise UserError(
                f"--evaluation: {folder} has no {TABLE_FILE}; give an output folder of megatron-cca evaluate or study"
            )
    own = sorted(path.parent for path in run.glob(f"*/{TABLE_FILE}")) + sorted(
        path.parent for path in run.glob(f"*/*/{TABLE_FILE}")
    )
    found = {folder.resolve(): folder for folder in [*own, *folders]}
    return [_read(folder) for folder in found.values()]


def _read(folder: Path) -> Judged:
    text = (folder / TABLE_FILE).read_text(encoding="utf-8", errors="replace")
    return Judged(folder, list(parts_of(text)), sorted(folder.glob("*.png")))


def parts_of(markdown: str) -> Iterator[str | Table]:
    """Yield the paragraphs and tables of a ``table.md`` as this project writes them."""
    for block in re.split(r"\n\s*\n", markdown.strip()):
        lines = block.splitlines()
        if len(lines) > 1 and _RULE.fullmatch(lines[1].strip()):
            yield Table([cell.text for cell in _cells(lines[0])], [_cells(line) for line in lines[2:]])
        elif block:
            yield block


def _cells(line: str) -> list[Cell]:
    inner = line.strip().removeprefix("|").removesuffix("|")
    texts = [text.replace(r"\|", "|").strip() for text in re.split(r"(?<!\\)\|", inner)]
    found = [_BOLD.fullmatch(text) for text in texts]
    return [Cell(text if bold is None else bold[1], bold is not None) for text, bold in zip(texts, found, strict=True)]
