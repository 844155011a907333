"""Paths as a person types them, in YAML, in ``--set`` and on command lines: one rule for all.

``~`` and ``~name`` at the beginning are a home folder. A shell variable that nothing has replaced is refused.
Everything else is taken as typed. Names inside a user's data files are not typed paths, and this rule is not for them.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from megatron_cca.errors import UserError, shortened

_VARIABLE = re.compile(r"\$(?:[A-Za-z_]\w*|\{[^{}/]*\})", re.ASCII)
# What Linux takes, in bytes.
LONGEST_NAME, _LONGEST_PATH = 255, 4095
_SHOWN = 120


def typed_path(text: str) -> str:
    """Return the path that a typed text stands for.

    Args:
        text: what was typed. A word that stands for data, such as ``digits``, is returned as it is.

    Raises:
        UserError: an empty text, an unknown home folder, a variable such as ``$HOME`` in a path that does not exist, or
            a name that no file can have.
    """
    shown = repr(shortened(text, _SHOWN))
    if not text:
        raise UserError("is empty; give a path")
    path = _from_home(text, shown) if text.startswith("~") else text
    if "\0" in path:
        raise UserError(f"{shown} holds a NUL character, which no path can; remove it")
    try:
        parts = [len(part) for part in os.fsencode(path).split(b"/")]
    except UnicodeEncodeError:
        raise UserError(f"{shown} holds half a character, which no path can; remove it") from None
    if max(parts) > LONGEST_NAME or sum(parts) + len(parts) - 1 > _LONGEST_PATH:
        raise UserError(
            f"{shown} is too long: at most {LONGEST_NAME} bytes between slashes and {_LONGEST_PATH} in all; shorten it"
        )
    # The name of the home folder itself is left out: the user has not typed it.
    _refuse_variables(path, len(path) - len(text.partition("/")[2]) if text.startswith("~") else 0, shown)
    return path


def path_option(text: str) -> Path:
    """Return a typed text as a path, for the ``type`` of an option that holds a file or folder.

    See :func:`typed_path`.
    """
    return Path(name_option(text))


def name_option(text: str) -> str:
    """Return a typed path or word for data, for the ``type`` of an option that may hold either.

    See :func:`typed_path`.
    """
    try:
        return typed_path(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def retyped(path: Path) -> str:
    """Return what to type for this path. It is ``./~a`` where ``Path`` has dropped the ``./`` and ``~a`` is a user."""
    return f"./{path}" if str(path).startswith("~") else str(path)


def _from_home(text: str, shown: str) -> str:
    name = text.partition("/")[0]
    try:
        home = str(Path(name).expanduser())
    except RuntimeError:
        home = ""
    # Python takes an empty HOME for the root folder, which nobody means.
    if name == "~" and (not home.startswith("/") or os.environ.get("HOME") == ""):
        raise UserError(f"{shown} cannot be found: no home folder is known; set HOME to it, or write the path itself")
    if not home.startswith("/"):
        raise UserError(
            f"{shown} cannot be found: there is no user {name[1:]!r}; write ./{name} for a file of that name"
        )
    return home + text[len(name) :]


def _refuse_variables(path: str, start: int, shown: str) -> None:
    """Refuse a variable after position ``start``, unless the path up to it exists under this very name."""
    found = list(_VARIABLE.finditer(path, start))
    if not found:
        return
    end = path.find("/", found[-1].start())
    if not os.path.lexists(path if end < 0 else path[:end]):
        raise UserError(f"{shown}: {found[0][0]} is not replaced here; write ~ for the home folder, or the path itself")
