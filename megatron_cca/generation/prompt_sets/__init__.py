"""Published sets of prompts, as their authors' files, each with its licence beside it.

``geneval``: 553 prompts of GenEval with what an image must show (arXiv 2310.11513, djghosh13/geneval, MIT). ``parti``:
1,632 prompts of PartiPrompts (arXiv 2206.10789, google-research/parti, Apache-2.0).
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

_FOLDER = Path(__file__).parent
GENEVAL, PARTI = "geneval", "parti"
# What --prompts takes in place of a file.
PROMPT_SETS = GENEVAL, PARTI


class Objects(NamedTuple):
    """Objects that an image must show, or must not.

    ``name`` is their class, of COCO's in GenEval's words. ``count`` is how many there must be at least, or where they
    are excluded, must not be. ``color`` is that of each. ``position`` is where they stand, such as "left of", and the
    place in the prompt's list of the objects that they stand so to.
    """

    name: str
    count: int
    color: str | None = None
    position: tuple[str, int] | None = None


class GenevalPrompt(NamedTuple):
    """A prompt of GenEval.

    ``tag`` is its task, such as ``counting``. The image must show all of ``include`` and none of ``exclude``.
    """

    text: str
    tag: str
    include: tuple[Objects, ...]
    exclude: tuple[Objects, ...]


@cache
def geneval_prompts() -> tuple[GenevalPrompt, ...]:
    """Return GenEval's prompts in the order of their file. No text is there twice."""
    lines = (_FOLDER / GENEVAL / "evaluation_metadata.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return tuple(
        GenevalPrompt(row["prompt"], row["tag"], _objects(row["include"]), _objects(row.get("exclude", [])))
        for row in rows
    )


def _objects(rows: list[dict]) -> tuple[Objects, ...]:
    return tuple(
        Objects(row["class"], row["count"], row.get("color"), tuple(row["position"]) if "position" in row else None)
        for row in rows
    )


def texts_of(name: str) -> list[str]:
    """Return the texts of one of ``PROMPT_SETS`` in the order of its file, without spaces at their ends."""
    if name == GENEVAL:
        return [prompt.text for prompt in geneval_prompts()]
    lines = (_FOLDER / PARTI / "PartiPrompts.tsv").read_text("utf-8").split("\n")
    # Quotation marks are part of a prompt here, not of the table.
    return [line.split("\t")[0].strip() for line in lines[1:] if line]
