"""Paths as a person types them, in YAML, in ``--set`` and on command lines: one rule for all.

``~`` and ``~name`` at the beginning are a home folder. A shell variable that nothing has replaced is refused.
Everything else is taken as typed. Names inside a user's data files are not typed paths; this rule is not for them.
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
    """The path that a typed text stands for.

    Args:
        text: what was typed; a word that stands for data, such as ``digits``, comes back as it is.

    Raises:
        UserError: an empty text, a home folder that is not known, a variable such as ``$HOME`` in the name of nothing
            that exists, what no file can be called.
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
    # Not in the name of the home folder itself, which nobody has typed.
    _refuse_variables(path, len(path) - len(text.partition("/")[2]) if text.startswith("~") else 0, shown)
    return path


def path_option(text: str) -> Path:
    """:func:`typed_path` as the ``type`` of an option that holds a file or folder."""
    return Path(name_option(text))


def name_option(text: str) -> str:
    """:func:`typed_path` as the ``type`` of an option that may hold a path or a word that stands for data."""
    try:
        return typed_path(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def retyped(path: Path) -> str:
    """What has to be typed to mean this path: ``./~a`` where ``Path`` has dropped the ``./`` and ``~a`` is a user."""
    return f"./{path}" if str(path).startswith("~") else str(path)


def _from_home(text: str, shown: str) -> str:
    name = text.partition("/")[0]
    try:
        home = str(Path(name).expanduser())
    except RuntimeError:
        home = ""
    # An empty HOME counts as the root folder to Python; nobody means that.
    if name == "~" and (not home.startswith("/") or os.environ.get("HOME") == ""):
        raise UserError(f"{shown} cannot be found: no home folder is known; set HOME to it, or write the path itself")
    if not home.startswith("/"):
        raise UserError(
            f"{shown} cannot be found: there is no user {name[1:]!r}; write ./{name} for a file of that name"
        )
    return home + text[len(name) :]


def _refuse_variables(path: str, start: int, shown: str) -> None:
    """Refuse a variable behind ``start``, unless the path up to it exists under this very name."""
    found = list(_VARIABLE.finditer(path, start))
    if not found:
        return
    end = path.find("/", found[-1].start())
    if not os.path.lexists(path if end < 0 else path[:end]):
        raise UserError(f"{shown}: {found[0][0]} is not replaced here; write ~ for the home folder, or the path itself")
