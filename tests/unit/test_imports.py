"""The house rules that can be read off the imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "megatron_cca"
FILES = sorted(PACKAGE.rglob("*.py"))

# Imports go down only: a package may import those with a smaller number, and itself.
LEVELS = {
    "errors": 0,
    "version": 0,
    "arrays": 1,
    "foreign": 1,
    "output": 1,
    "pickles": 1,
    "reporting": 1,
    "config": 1,
    "config_files": 2,
    "platform": 1,
    "objectives": 2,
    "parallel": 2,
    "models": 3,
    "checkpoint": 4,
    "data": 4,
    "evaluation": 5,
    "generation": 6,
    "training": 7,
    "planner": 8,
    "studies": 8,
    "scaling": 9,
}


def imported_modules(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(file):
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_go_down_only(file):
    for module in imported_modules(file):
        parts = module.split(".")
        if parts[0] == "megatron_cca" and len(parts) > 1 and parts[1] in LEVELS and room(file) in LEVELS:
            same = parts[1] == room(file)
            assert same or LEVELS[parts[1]] < LEVELS[room(file)], f"{file}: imports {module}"


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("torch.cuda", "platform/"),
        ("nvidia.dali", "data/dali.py"),
        ("torch_fidelity", "evaluation/fidelity.py"),
    ],
)
def test_what_only_one_place_may_touch(text, allowed):
    for file in FILES:
        name = str(file.relative_to(PACKAGE))
        if not name.startswith(allowed):
            assert text not in file.read_text(), f"{name} names {text}; only {allowed} may"


def test_objectives_know_no_megatron():
    for file in (PACKAGE / "objectives").glob("*.py"):
        assert not any(module.startswith("megatron.") for module in imported_modules(file))


# What may know a family by name: its own folder, the table of families, and readers of its files.
FAMILY_FOLDERS = ("models/emu3/", "models/llamagen/")
MAY_NAME_FAMILIES = (*FAMILY_FOLDERS, "models/__init__.py", "data/sources/emu3.py", "data/sources/llamagen.py")


def test_no_module_imports_a_family_by_name():
    families = tuple(f"megatron_cca.{folder.rstrip('/').replace('/', '.')}" for folder in FAMILY_FOLDERS)
    for file in FILES:
        name = str(file.relative_to(PACKAGE))
        for module in imported_modules(file):
            named = next((family for family in families if f"{module}.".startswith(f"{family}.")), None)
            if named is not None:
                own = name.startswith(named.removeprefix("megatron_cca.").replace(".", "/") + "/")
                assert own or (name.startswith(MAY_NAME_FAMILIES) and not name.startswith(FAMILY_FOLDERS)), (
                    f"{name} imports {module}; ask the vocabulary or the family table"
                )


WITHOUT_EXTRAS = """
import sys
from megatron_cca import platform
platform.install("cpu")
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"matplotlib", "sklearn", "scipy", "torch_fidelity", "transformers", "nvidia"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
import megatron_cca.training.loop
"""


def test_training_needs_no_extra():
    done = subprocess.run([sys.executable, "-c", WITHOUT_EXTRAS], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
