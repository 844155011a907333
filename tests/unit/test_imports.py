"""The house rules that can be read off the imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_cca.objectives import OBJECTIVES

PACKAGE = Path(__file__).resolve().parents[2] / "megatron_cca"
FILES = sorted(PACKAGE.rglob("*.py"))

# Imports go down only: a package may import those with a smaller number, and itself.
LEVELS = {
    "keys": 0,
    "errors": 0,
    "terminal": 0,
    "version": 0,
    "io": 1,
    "reporting": 2,
    "objectives": 2,
    "config": 3,
    "megatron_compat": 4,
    "platform": 5,
    "parallel": 6,
    "models": 7,
    "checkpoint": 8,
    "data": 8,
    "generation": 9,
    "training": 10,
    "lab": 11,
    "lab/evaluation": 12,
    "lab/planner": 13,
    "lab/studies": 13,
    "lab/scaling": 14,
    "lab/run_report": 14,
    "programs": 15,
    "__main__": 16,
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
    assert len(FILES) > 150


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


def test_the_keys_of_a_run_are_read_without_torch():
    script = "import sys, megatron_cca.config.load; print(*{'torch', 'megatron.core', 'numpy'} & set(sys.modules))"
    command = [sys.executable, "-c", script]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert found.stdout.split() == []


def named_objectives(file):
    """Where a file compares something with an objective's name, or the name with anything, as a line each."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Compare | ast.MatchValue):
            inside = list(ast.walk(node))
            is_name = any(isinstance(one, ast.Constant) and one.value in OBJECTIVES for one in inside)
            if is_name or any(ast.unparse(one).endswith("objective.name") for one in inside):
                yield f"{file.relative_to(PACKAGE)}:{node.lineno}: {ast.unparse(node)}"


def test_nobody_else_compares_the_name_of_an_objective():
    others = [file for file in FILES if file.parent.name != "objectives"]
    found = [line for file in others for line in named_objectives(file)]
    assert not found, "\n".join(["ask the objective what it declares:", *found])


# What may know a family by name: its own folder, the table of families, and readers of its files.
FAMILY_FOLDERS = ("models/emu3/", "models/emu3_5/", "models/janus/", "models/llamagen/", "models/var/")
# A family that continues another one, and shares with it what did not change.
SUCCESSORS = {"models/emu3_5/": "models/emu3/"}
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
        may |= any(name.startswith(own) and folder == of for own, of in SUCCESSORS.items())
        if folder is not None and not may and not name.startswith(folder):
            yield f"{name} imports {module}"


def test_no_module_imports_a_family_by_name():
    found = [line for file in FILES for line in named_families(file)]
    assert not found, "\n".join(["ask the vocabulary or the family table:", *found])


def is_of_the_project(node, names):
    """Whether an expression is one of ``names``, a part of one, or a module of the project looked up by its name."""
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        if isinstance(node, ast.Call):
            looks_up = ast.unparse(node.func).endswith(("getattr", "import_module"))
            node = node.args[0] if looks_up and node.args else None
        elif ast.unparse(node.value) == "sys.modules":
            node = node.slice
        else:
            node = node.value
    if isinstance(node, ast.Constant):
        return str(node.value).split(".")[0] == "megatron_cca"
    return isinstance(node, ast.Name) and node.id in names


def names_of_the_project(tree):
    """What a file calls the project's modules, classes and functions: by import, and by assignment of such a name."""
    found, before = set(), None
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            ours = [alias for alias in node.names if (module or alias.name).split(".")[0] == "megatron_cca"]
            found |= {alias.asname or (alias.name if module else "megatron_cca") for alias in ours}
    while found != before:
        before = set(found)
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and is_of_the_project(node.value, found):
                found |= {name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return found


def replaced(text):
    """What a file replaces in the project's modules and classes, as a line each."""
    tree = ast.parse(text)
    names = names_of_the_project(tree)
    for node in ast.walk(tree):
        places = []
        if isinstance(node, ast.Call) and {"patch", "setattr", "delattr"} & set(ast.unparse(node.func).split(".")):
            places = node.args[:1]
        elif isinstance(node, ast.Assign | ast.Delete):
            places = [place for target in node.targets for place in getattr(target, "elts", [target])]
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            places = [node.target]
        is_bound_name = isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.Delete)
        for place in places:
            if is_of_the_project(place, names) and not (is_bound_name and isinstance(place, ast.Name)):
                yield ast.unparse(node)


def test_the_laboratory_replaces_nothing_in_the_project():
    """What it does otherwise than a training job it says through parameters and ``platform/operations.py``."""
    files = list((PACKAGE / "lab").rglob("*.py"))
    found = [f"{file.relative_to(PACKAGE)}: {line}" for file in files for line in replaced(file.read_text())]
    assert len(files) > 20
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        "patch.object(setup, 'build_run', None)",
        "mock.patch('megatron_cca.training.setup.build_run')",
        "setattr(setup.Run, 'start', None)",
        "setup.build_run = None",
        "former, setup.build_run = setup.build_run, None",
        "cls = setup.Run; cls.start = None",
        "importlib.import_module('megatron_cca.models.lora').Adapter = None",
        "sys.modules['megatron_cca.models.lora'].Adapter = None",
        "build_chunks.limit = 3",
        "OBJECTIVES['cca'] = None",
        "del setup.build_run",
    ],
)
def test_a_replacement_is_seen(line):
    imports = "import importlib, sys\nfrom megatron_cca.training import setup\n"
    assert list(replaced(f"{imports}from megatron_cca.training.setup import build_chunks, OBJECTIVES\n{line}"))
    assert not list(replaced(f"{imports}run = setup.set_up(None)\nrun.iteration = 3\nsetattr(run, 'start', None)"))
