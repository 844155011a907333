"""The house rules that can be read off the imports."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "megatron_cca"
FILES = sorted(PACKAGE.rglob("*.py"))

# Imports go down only: a package may import those with a smaller number, and itself.
LEVELS = {
    "errors": 0,
    "signals": 0,
    "version": 0,
    "display": 1,
    "io": 1,
    "reporting": 2,
    "config": 2,
    "platform": 3,
    "objectives": 3,
    "parallel": 4,
    "models": 5,
    "checkpoint": 6,
    "data": 6,
    "generation": 7,
    "training": 8,
    "lab": 9,
    "lab/evaluation": 9,
    "lab/planner": 10,
    "lab/studies": 10,
    "lab/scaling": 11,
    "programs": 12,
    "__main__": 13,
}


def imported_modules(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(parts):
    """The package or module of LEVELS that a dotted or a file's name leads to; of the lab, its own packages."""
    inner = "/".join(parts[:2])
    return inner if inner in LEVELS else parts[0]


def upward(file):
    """What a file imports from its own level or above, as a line each."""
    for module in imported_modules(file):
        package, _, rest = module.partition(".")
        ours, theirs = room(file.relative_to(PACKAGE).with_suffix("").parts), room(rest.split("."))
        known = package == "megatron_cca" and {ours, theirs} <= LEVELS.keys()
        if known and ours != theirs and LEVELS[theirs] >= LEVELS[ours]:
            yield f"{file.relative_to(PACKAGE)} imports {module}"


def test_imports_go_down_only():
    found = [line for file in FILES for line in upward(file)]
    assert not found, "\n".join(found)
    assert len(FILES) > 200


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("torch.cuda", "platform/"),
        ("nvidia.dali", "data/dali.py"),
        ("torch_fidelity", "lab/evaluation/fidelity.py"),
    ],
)
def test_what_only_one_place_may_touch(text, allowed):
    names = {str(file.relative_to(PACKAGE)) for file in FILES if text in file.read_text()}
    assert not {name for name in names if not name.startswith(allowed)}, f"only {allowed} may name {text}"
    assert names, f"nobody names {text} any more; forget the rule"


def test_objectives_know_no_megatron():
    files = list((PACKAGE / "objectives").glob("*.py"))
    found = [file.name for file in files if any(name.startswith("megatron.") for name in imported_modules(file))]
    assert files and not found


# What may know a family by name: its own folder, the table of families, and readers of its files.
FAMILY_FOLDERS = ("models/emu3/", "models/llamagen/")
MAY_NAME_FAMILIES = (*FAMILY_FOLDERS, "models/__init__.py", "data/sources/emu3.py", "data/sources/llamagen.py")


def named_families(file):
    """What a file imports of a family that is not its own, as a line each."""
    name = str(file.relative_to(PACKAGE))
    for module in imported_modules(file):
        folder = next(
            (
                folder
                for folder in FAMILY_FOLDERS
                if f"{module}.".startswith(f"megatron_cca.{folder.replace('/', '.')}")
            ),
            None,
        )
        may = name.startswith(MAY_NAME_FAMILIES) and not name.startswith(FAMILY_FOLDERS)
        if folder is not None and not may and not name.startswith(folder):
            yield f"{name} imports {module}"


def test_no_module_imports_a_family_by_name():
    found = [line for file in FILES for line in named_families(file)]
    assert not found, "\n".join(["ask the vocabulary or the family table:", *found])
