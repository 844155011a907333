"""Write the page of all programs and their options from the options' definitions; ``make docs`` calls it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args, get_origin

from megatron_cca.__main__ import programs
from megatron_cca.io.options import Described, described

_INTRODUCTION = """# Programs

<!-- Written by docs/hooks/programs.py from the options' definitions; change them there, then `make docs`. -->

`pip install` brings the command `megatron-cca`. In a checkout `python -m megatron_cca` is the same, and so is the file
that each section names. torchrun starts several processes:

    megatron-cca train --config emu3_tiny_cca
    torchrun --nproc_per_node 2 -m megatron_cca train --config emu3_tiny_cca

`--config` takes a file, or the name of an example: {examples}.

A bad option is refused in one line, with exit status 2. `--help` behind a program's name, or a command's, says what it
takes.
"""
# Where the file is not called as the program is.
_FILES = {
    "convert": "tools/convert_checkpoint.py",
    "tokenize": "tools/tokenize_images.py",
    "train": "examples/pretrain_cca_emu3.sh",
}


def main(output: str) -> None:
    """Write the page, where it differs."""
    path, text = Path(output), page()
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def page() -> str:
    """Return the whole page as Markdown."""
    from megatron_cca.config import example_names

    parts = [_INTRODUCTION.format(examples=", ".join(f"`{name}`" for name in example_names()))]
    for name, file in programs().items():
        module = importlib.import_module(f"megatron_cca.programs.{file.stem}")
        path = _FILES.get(name, f"tools/{file.stem}.py")
        parts.append(f"## {name}\n\n{module.__doc__}\n\nThe same in a checkout: `{path}`.\n")
        kinds = {"": module.OPTIONS} if isinstance(module.OPTIONS, type) else module.OPTIONS
        for command, kind in kinds.items():
            if command:
                parts.append(f"### {name} {command}\n\n{' '.join(kind.__doc__.split())}\n")
            parts.append(_table(kind))
    return "\n".join(parts)


def _table(kind: type) -> str:
    rows = ["| option | values | default | |", "|---|---|---|---|"]
    for one in _flat(kind):
        cells = [f"`{one.name}`", _values(one), _default(one), _text(one.doc)]
        rows.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _flat(kind: type) -> Iterator[Described]:
    for one in described(kind):
        if one.nested is None:
            yield one
        else:
            yield from _flat(one.nested)


def _values(one: Described) -> str:
    if one.kind is bool:
        return f"or `--no-{one.name[2:]}`" if one.default and not one.name.startswith("--no-") else ""
    choices = get_args(one.kind) if get_origin(one.kind) is Literal else one.option.choices
    if choices:
        return ", ".join(f"`{choice}`" for choice in choices)
    kinds = {int: "whole number", float: "number", Path: "path", str: "text"}
    several = {None: "", 0: ", several", 2: ", two"}[one.count]
    return f"{kinds[one.kind]}{several}"


def _default(one: Described) -> str:
    if one.is_required or one.option.one_of:
        return "one of these" if one.option.one_of else "needed"
    if isinstance(one.default, bool) or one.default in (None, "", ()):
        return ""
    return f"`{one.default}`"


def _text(doc: str) -> str:
    return "<br>".join(doc.replace("<", "&lt;").splitlines())


if __name__ == "__main__":
    main(sys.argv[1])
