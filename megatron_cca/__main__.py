"""``python -m megatron_cca PROGRAM ...`` and the console script ``megatron-cca``: start a program by its name."""

from __future__ import annotations

import ast
import difflib
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_cca import __version__
from megatron_cca.errors import UserError
from megatron_cca.reporting import reported_errors

_NAME = "megatron-cca"


def main(argv: Sequence[str] | None = None) -> None:
    """Start the program that the first argument names, with the other arguments. Import no other program."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        sys.exit(0 if argv else 2)
    if argv[0] == "--version":
        print(f"{_NAME} {__version__}")
        sys.exit(0)
    files = programs()
    if argv[0] not in files:
        close = difflib.get_close_matches(argv[0], files, n=1)
        advice = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(files)}"
        with reported_errors():
            raise UserError(f"{argv[0]}: is no program; {advice}")
    # The program's help shows this name.
    sys.argv = [f"{_NAME} {argv[0]}", *argv[1:]]
    importlib.import_module(f"megatron_cca.programs.{files[argv[0]].stem}").main(argv[1:])


def programs() -> dict[str, Path]:
    """Return the file of each program by its name, sorted."""
    files = sorted((Path(__file__).parent / "programs").glob("*.py"))
    return {file.stem.replace("_", "-"): file for file in files if file.stem not in ("__init__", "parsing")}


def _help() -> str:
    lines = [f"usage: {_NAME} PROGRAM ...", ""]
    for name, file in programs().items():
        # Parse the file: an import would load much more than its first line.
        about = ast.get_docstring(ast.parse(file.read_text())) or ""
        lines.append(f"  {name:24}{about.splitlines()[0]}")
    return "\n".join(
        [*lines, "", f"{_NAME} PROGRAM --help says what a program takes, {_NAME} --version which version this is."]
    )


# Guarded, since Megatron's checkpoint writer spawns a helper process that imports this file again.
if __name__ == "__main__":
    main()
