"""An installation without extras: what ``pip install megatron-cca`` alone does not bring cannot be imported.

python -m tests.references.core_install JSON    where JSON is [[program, argument, ...], ...]
"""

from __future__ import annotations

import ast
import json
import os
import runpy
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import Distribution, DistributionFinder, distribution, distributions
from importlib.metadata import PackageNotFoundError as NotInstalled
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]


def core_requirements() -> list[str]:
    """``CORE`` of setup.py."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "CORE":
            return ast.literal_eval(node.value)
    raise AssertionError("setup.py has no CORE any more")


def brought_along() -> set[str]:
    """The core's distributions that are installed here: what it requires, what that requires, and so on."""
    wanted, found = [Requirement(line) for line in core_requirements()], {"megatron-cca"}
    while wanted:
        one = wanted.pop()
        name = canonicalize_name(one.name)
        if name in found:
            continue
        try:
            lines = distribution(name).requires or []
        except NotInstalled:
            continue
        found.add(name)
        wanted += [needed for needed in map(Requirement, lines) if _is_needed(needed, one.extras)]
    return found


def _is_needed(requirement: Requirement, extras: set[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in extras or {""})


def _modules(one: Distribution) -> Iterator[tuple[str, ...]]:
    """First and second names of what a distribution can import."""
    for file in one.files or ():
        if file.suffix in (".py", ".so") and file.parts[0] != "..":
            yield tuple(part.partition(".")[0] for part in file.parts[:2])


class CoreOnly:
    """A finder of modules and distributions that knows the core's alone."""

    def __init__(self, finder, kept: set[str], forgotten: set[str]) -> None:
        self._finder, self._kept, self._forgotten = finder, kept, forgotten

    def __getattr__(self, name):
        return getattr(self._finder, name)

    def find_spec(self, name, path=None, target=None):
        first_two = name.split(".")[:2]
        if {first_two[0], ".".join(first_two)} & self._forgotten:
            return None
        return self._finder.find_spec(name, path, target)

    def find_distributions(self, context=DistributionFinder.Context()):  # noqa: B008 - as importlib.metadata has it
        find = getattr(self._finder, "find_distributions", None)
        found = find(context) if find else ()
        return (one for one in found if one.name and canonicalize_name(one.name) in self._kept)


def forget_extras() -> set[str]:
    """Make this process one of an installation without extras; return what it can no longer import."""
    kept = brought_along()
    ours: set[tuple[str, ...]] = set()
    others: set[tuple[str, ...]] = set()
    for one in distributions():
        if one.name:
            (ours if canonicalize_name(one.name) in kept else others).update(_modules(one))
    shared = {module[0] for module in ours}
    forgotten = {".".join(module[:2] if module[0] in shared else module[:1]) for module in others - ours}
    sys.meta_path[:] = [CoreOnly(finder, kept, forgotten) for finder in sys.meta_path]
    for name in list(sys.modules):
        if {name.partition(".")[0], ".".join(name.split(".")[:2])} & forgotten:
            del sys.modules[name]
    return forgotten


def run(program: str, arguments: list[str]) -> tuple[int, str, str]:
    """Status, output and errors of a program of ours, run in a fork of this process."""
    with tempfile.TemporaryDirectory() as folder:
        files = [f"{folder}/out", f"{folder}/err"]
        child = os.fork()
        if not child:
            _become(program, arguments, files)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return status, *(Path(file).read_text() for file in files)


def _become(program: str, arguments: list[str], files: list[str]) -> None:
    status = 1
    try:
        for descriptor, file in zip((1, 2), files, strict=True):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
        sys.argv = [program, *arguments]
        runpy.run_path(program, run_name="__main__")
        status = 0
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    names = sorted(forget_extras())
    from megatron_cca import platform

    platform.install("cpu")
    # Once for all programs.
    import megatron_cca.training.loop  # noqa: F401

    answers = [run(program, arguments) for program, *arguments in json.loads(sys.argv[1])]
    package = str(Path(platform.__file__).parents[1])
    print(json.dumps({"forgotten": names, "package": package, "answers": answers}))
