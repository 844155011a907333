"""What the project relies on in Megatron-Core and Transformer Engine is there, and only one place reaches into them.

After an upgrade of Megatron-Core this file says what has changed. ``megatron_cca/megatron_compat`` says why it matters.
"""

import ast
import importlib
import inspect
import textwrap
from pathlib import Path

import pytest

from megatron_cca import megatron_compat
from megatron_cca.megatron_compat.relied_on import RELIED_ON, ReliedOn

PACKAGE = Path(megatron_compat.__file__).parents[1]
COMPAT = Path(megatron_compat.__file__).parent


def declarations(*, of_engine):
    """The declarations about Transformer Engine, which only tests/te and a GPU can check, or all others."""
    return [
        pytest.param(one, id=f"{file}-{one.name}")
        for file, ones in RELIED_ON.items()
        for one in ones
        if one.name.startswith("transformer_engine") == of_engine
    ]


def resolved(name):
    """What a dotted name leads to: the longest module that it begins with, and attributes from there on."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError as error:
            if not ".".join(parts[:length]).startswith(error.name):
                raise
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise AttributeError(name)


def source(thing):
    """The source of a module, function or class; of a class also that of what it inherits."""
    if inspect.isclass(thing):
        known = ("megatron", "transformer_engine", "torch")
        classes = [cls for cls in thing.__mro__ if cls.__module__.partition(".")[0] in known]
        return "\n".join(inspect.getsource(cls) for cls in classes)
    return inspect.getsource(inspect.unwrap(thing))


def attributes(thing):
    """The attributes that a thing has, and those that its source sets on ``self``."""
    found = set(dir(thing)) | set(getattr(thing, "__annotations__", ()))
    if inspect.isclass(thing):
        for node in ast.walk(ast.parse(textwrap.dedent(source(thing)))):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and ast.unparse(node.value) == "self"
            ):
                found.add(node.attr)
    return found


def unmet(one):
    """What is not as a declaration says, a line each."""
    try:
        thing = resolved(one.name)
    except AttributeError:
        return ["does not exist"]
    found = []
    if one.parameters is not None or one.takes:
        names = tuple(inspect.signature(inspect.unwrap(thing)).parameters)
        if one.parameters not in (None, names):
            found.append(f"has the parameters {names}, not {one.parameters}")
        found += [f"takes no {name}" for name in one.takes if name not in names]
    found += [f"has no {name}" for name in one.has if name not in attributes(thing)]
    text = source(thing) if one.says else ""
    found += [f"does not say {words!r} any more" for words in one.says if words not in text]
    if one.equals is not None and thing != one.equals:
        found.append(f"is {thing!r}, not {one.equals!r}")
    return found


def check(one):
    """Hold a declaration against what is installed."""
    problems = unmet(one)
    assert not problems, f"{one.name} ({one.why}): {'; '.join(problems)}"


@pytest.mark.parametrize("one", declarations(of_engine=False))
def test_what_is_relied_on_is_there(one):
    check(one)


def test_declarations_are_about_both():
    assert declarations(of_engine=True) and declarations(of_engine=False)


SAVE = "megatron.core.dist_checkpointing.serialization.save"


@pytest.mark.parametrize(
    ("one", "problem"),
    [
        (ReliedOn("megatron.core.no_such_module", ""), "does not exist"),
        (ReliedOn(f"{SAVE}_no_more", ""), "does not exist"),
        (ReliedOn(SAVE, "", parameters=("state",)), "has the parameters"),
        (ReliedOn(SAVE, "", takes=("no_such",)), "takes no no_such"),
        (ReliedOn("megatron.core.models.gpt.GPTModel", "", has=("decoder", "no_such")), "has no no_such"),
        (ReliedOn(SAVE, "", says=("no such words",)), "does not say 'no such words'"),
        (ReliedOn("megatron.core.dist_checkpointing.core.CONFIG_FNAME", "", equals="other"), "is 'metadata.json'"),
    ],
)
def test_a_change_is_found(one, problem):
    (found,) = unmet(one)
    assert found.startswith(problem)


class Uses(ast.NodeVisitor):
    """What a file imports from Megatron-Core, and how it uses that."""

    def __init__(self, tree):
        self.names, self.reached, self.calls, self.imports = {}, [], [], []
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and is_foreign(node.module):
                for alias in node.names:
                    self.names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                    self.imports.append(f"{node.module}.{alias.name}")
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if is_foreign(alias.name):
                        self.names[alias.asname or alias.name.partition(".")[0]] = alias.name
                        self.imports.append(alias.name)
        self.reached += [f"imports {name}" for name in self.imports if is_private(name.rpartition(".")[2])]
        self.visit(tree)

    def target(self, node):
        """The foreign name that an expression begins with, and the rest of it; None where it is another's."""
        text = ast.unparse(node)
        head, _, rest = text.partition(".")
        return f"{self.names[head]}.{rest}".rstrip(".") if head in self.names else None

    def visit_Attribute(self, node):
        found = self.target(node)
        if found is not None and is_private(node.attr):
            self.reached.append(f"uses {found}")
        if found is not None and not isinstance(node.ctx, ast.Load):
            self.reached.append(f"assigns to {found}")
        self.generic_visit(node)

    def visit_Call(self, node):
        function, first = ast.unparse(node.func), node.args[0] if node.args else ast.Constant(None)
        found, is_name = self.target(first), isinstance(first, ast.Constant) and is_foreign(first.value)
        if found is not None and function.endswith(("setattr", "delattr", "patch.object")):
            self.reached.append(f"{function} of {found}")
        if is_name and function.endswith(("patch", "import_module", "sys.modules.setdefault", "__import__")):
            self.reached.append(f"{function} of {first.value}")
        found = self.target(node.func)
        if found is not None:
            self.calls.append((found, [keyword.arg for keyword in node.keywords if keyword.arg]))
        self.generic_visit(node)

    def visit_Subscript(self, node):
        is_name = isinstance(node.slice, ast.Constant) and is_foreign(node.slice.value)
        if ast.unparse(node.value) == "sys.modules" and is_name and not isinstance(node.ctx, ast.Load):
            self.reached.append(f"assigns to {ast.unparse(node)}")
        self.generic_visit(node)

    def visit_ClassDef(self, node):
        if any(self.target(base) is not None for base in node.bases):
            methods = [one.name for one in node.body if isinstance(one, ast.FunctionDef) and is_private(one.name)]
            self.reached += [f"class {node.name} of Megatron's has {name}" for name in methods]
        self.generic_visit(node)


def is_foreign(module):
    first = module.partition(".")[0] if isinstance(module, str) else None
    return first in ("megatron", "transformer_engine", "apex", "nvidia_resiliency_ext")


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def uses(text):
    return Uses(ast.parse(text))


FILES = sorted(PACKAGE.rglob("*.py"))


def test_only_megatron_compat_reaches_in():
    others = [file for file in FILES if COMPAT not in file.parents]
    found = [f"{file.relative_to(PACKAGE)} {what}" for file in others for what in uses(file.read_text()).reached]
    assert not found, "\n".join(["belongs into megatron_cca/megatron_compat:", *found])
    assert any(uses(file.read_text()).reached for file in COMPAT.glob("*.py"))


@pytest.mark.parametrize(
    "line",
    [
        "from megatron.core.safe_globals import _private",
        "from megatron.core import utils\nutils._private",
        "from megatron.core import utils\nutils.torch = 1",
        "from megatron.core import utils\ndel utils.torch",
        "from megatron.core.optimizer import DistributedOptimizer as D\nD.step = 1",
        "from megatron.core import utils\nsetattr(utils, name, 1)",
        "from megatron.core import utils\nfrom unittest.mock import patch\npatch.object(utils, 'torch', 1)",
        "from unittest import mock\nmock.patch('megatron.core.utils.torch')",
        "import importlib\nimportlib.import_module('megatron.core.utils').torch = 1",
        "import sys\nsys.modules['apex'] = None",
        "from megatron.core.optimizer import DistributedOptimizer as D\nclass Ours(D):\n def _step(self): 1",
        "def late():\n from megatron.core import utils\n utils._private = 1",
    ],
)
def test_a_file_that_reaches_in_is_found(line):
    assert uses(line).reached


@pytest.mark.parametrize(
    "line",
    [
        "from megatron.core import parallel_state\nparallel_state.get_data_parallel_rank()",
        "from megatron.core.transformer.module import Float16Module as F\nmodel = F(config, gpt)\nmodel.x = 1",
        "from torch import nn\nnn._private = 1",
    ],
)
def test_what_is_public_may_be_used(line):
    assert not uses(line).reached


def signature(name):
    """The parameters by which something can be called; None where it takes any."""
    parameters = inspect.signature(inspect.unwrap(resolved(name))).parameters.values()
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters):
        return None
    return {one.name for one in parameters}


def public_uses():
    for file in FILES:
        found = uses(file.read_text())
        if any(name.startswith("megatron.") for name in found.imports):
            yield pytest.param(found, id=str(file.relative_to(PACKAGE)))


@pytest.mark.parametrize("found", [*public_uses()])
def test_what_is_imported_exists_and_takes_the_arguments_it_is_given(found):
    wrong = []
    for name in found.imports:
        if name.startswith("megatron."):
            try:
                resolved(name)
            except AttributeError:
                wrong.append(f"{name} does not exist")
    for name, keywords in found.calls:
        known = signature(name) if name.startswith("megatron.") and "(" not in name else None
        wrong += [f"{name} takes no {keyword}" for keyword in keywords if known is not None and keyword not in known]
    assert not wrong, "\n".join(wrong)


def test_every_file_says_what_it_relies_on_and_why():
    assert {*RELIED_ON} == {file.stem for file in COMPAT.glob("*.py")} - {"relied_on"}
    everything = [one for ones in RELIED_ON.values() for one in ones]
    assert len(everything) > 45
    assert all(one.why for one in everything)
