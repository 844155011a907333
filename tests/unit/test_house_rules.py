"""The house rules: a function's docstring begins with a verb, and no file is too long to be about one thing."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megatron_cca"
PLACES = ("megatron_cca", "tests", "benchmarks", "docker", "docs/hooks", "examples", "tools")
LONGEST = 400  # lines of a file

# What has been edited: packages, families and modules. Whoever edits another one adds it.
EDITED = [
    "__main__.py",
    "programs",
    "checkpoint",
    "config",
    "data",
    "keys.py",
    "errors.py",
    "generation",
    "io",
    "lab",
    "megatron_compat",
    "models",
    "objectives",
    "parallel",
    "platform",
    "reporting.py",
    "terminal.py",
    "training",
    "version.py",
]
NO_VERBS = frozenset(
    re.findall(
        r"\w+",
        """
        a after all an and another any as at because before between bool both but by caption captions codes during each
        either every everything few first float for from height how ids if images in inside int into is it its last
        like lines many more most names neither no nobody none not nothing of on once one only or other our out outside
        over positions rows same several shapes since so some such that the their them then there these they this those
        through token tokens two under until up upon vocabulary what whatever when where whether which while who
        whoever whom whose why with within without
        """,
    )
)


def functions(file):
    """Functions and methods with a docstring, but for properties, with their qualified names."""
    found = [(ast.parse(file.read_text()), "")]
    while found:
        node, name = found.pop()
        for child in ast.iter_child_nodes(node):
            known = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            found.append((child, f"{name}.{child.name}" if known else name))
            if known and not isinstance(child, ast.ClassDef) and not is_property(child) and ast.get_docstring(child):
                yield f"{name}.{child.name}".lstrip("."), ast.get_docstring(child)


def is_property(function):
    decorators = {ast.unparse(decorator).rpartition(".")[2] for decorator in function.decorator_list}
    return bool(decorators & {"property", "cached_property", "setter"})


def begins_with_a_verb(docstring):
    word = docstring.split()[0].rstrip(".,:")
    return word.replace("-", "").isalpha() and word[0].isupper() and word.lower() not in NO_VERBS


@pytest.mark.parametrize("edited", EDITED)
def test_docstrings_of_functions_begin_with_a_verb(edited):
    place = PACKAGE / edited
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place]
    found = [
        f"{file.relative_to(PACKAGE)}: {function} begins: {docstring.splitlines()[0]}"
        for file in files
        for function, docstring in functions(file)
        if not begins_with_a_verb(docstring)
    ]
    assert not found, "begin with a verb, such as Return:\n" + "\n".join(found)
    assert sum(1 for file in files for _ in functions(file)), f"{edited} has no functions; forget it"


@pytest.mark.parametrize(
    "docstring", ["The size.", "``[B, 1]``.", "int64 ``[B]``.", ":func:`f` of each.", "3 rows.", "Codes of all."]
)
def test_what_is_no_verb(docstring):
    assert not begins_with_a_verb(docstring)


def test_what_is_a_verb():
    assert begins_with_a_verb("Return the size.")
    assert begins_with_a_verb("See :class:`Source`.")


def too_long(place):
    """Name the files below a folder that have more lines than one thing takes."""
    lengths = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in sorted(place.rglob("*.py"))}
    assert lengths, f"{place} has no sources; forget it"
    return [f"{file.relative_to(place)}: {length} lines" for file, length in lengths.items() if length > LONGEST]


def test_no_file_is_too_long():
    found = [f"{place}/{named}" for place in PLACES for named in too_long(ROOT / place)]
    assert not found, f"{LONGEST} lines at most; make two files, each about one thing:\n" + "\n".join(found)


def test_what_is_too_long(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/fits.py").write_text("pass\n" * LONGEST)
    assert too_long(tmp_path) == []
    (tmp_path / "sub/long.py").write_text("pass\n" * LONGEST + "pass")
    assert too_long(tmp_path) == ["sub/long.py: 401 lines"]
