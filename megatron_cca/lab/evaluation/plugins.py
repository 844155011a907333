"""Functions of the user, with names of the form ``FILE.py:FUNCTION``."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_cca.errors import UserError, error_context
from megatron_cca.io.typed_paths import typed_path


def is_function_spec(spec: str) -> bool:
    """Check whether a name has the form ``FILE.py:FUNCTION``."""
    file, separator, _ = spec.rpartition(":")
    return bool(separator) and file.endswith(".py")


def load_function(spec: str, option: str) -> Callable:
    """Run a Python file and return one of its functions.

    Args:
        spec: ``FILE.py:FUNCTION``. Each process runs the file once, as an import does.
        option: the option that names it, for messages.

    Returns:
        The function. Any exception of it becomes a :class:`UserError`.

    Raises:
        UserError: another form, no such file, a file that fails when it runs, or no such function in it.
    """
    if not is_function_spec(spec):
        raise UserError(f"{option}: {spec!r} is not of the form FILE.py:FUNCTION")
    name, _, function = spec.rpartition(":")
    with error_context(option):
        file = Path(typed_path(name))
    if not file.is_file():
        raise UserError(f"{option}: the file {file} does not exist")
    module = _run(file, option)
    if not hasattr(module, function):
        raise UserError(f"{option}: {file} defines no {function!r}")
    if not callable(getattr(module, function)):
        raise UserError(f"{option}: {function!r} in {file} is not a function")
    return _guarded(getattr(module, function), spec, option)


@contextmanager
def failures_said(spec: str, option: str) -> Iterator[None]:
    """Turn an exception of the user's code into one line, with its line number in the user's file.

    Raises:
        UserError: begins with ``option`` and ``spec``.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        file = Path(typed_path(spec.rpartition(":")[0])).resolve()
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        where = f" at line {lines[-1]}" if lines else ""
        reason = " ".join(str(error).split())
        raise UserError(f"{option}: {spec} failed{where}: {type(error).__name__}: {reason}") from None


def _guarded(function: Callable, spec: str, option: str) -> Callable:
    @functools.wraps(function)
    def called(*arguments):
        with failures_said(spec, option):
            return function(*arguments)

    return called


def _run(file: Path, option: str) -> object:
    path = file.resolve()
    # In sys.modules it has its own name. Dataclasses and pickle look for it there. It does not hide another module.
    name = f"_user_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if not isinstance(error, Exception):
            raise
        reason = " ".join(str(error).split())
        raise UserError(f"{option}: {file} cannot be run: {type(error).__name__}: {reason}") from None
    return module
