"""What somebody else may have written: JSON, and the names that a list or an index gives to the files beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_cca.errors import UserError, shortened


def file_below(folder: Path, name: object) -> Path:
    """The file that a name found inside a folder stands for.

    Args:
        folder: which the user named; it may be a symbolic link itself.
        name: foreign, relative to it.

    Raises:
        UserError: no text, an absolute name, one that leaves the folder by ".." or by a symbolic link, no such file.
    """
    if not isinstance(name, str) or not is_below(folder, name):
        raise UserError(f"{shortened(repr(name), 80)} is not a file of {folder}")
    path = folder / name
    if not os.path.isfile(path):  # noqa: PTH113 - Path.is_file raises for names that no file can have
        raise UserError(f"{shortened(name, 80)} is missing in {folder}")
    return path


def is_below(folder: Path, name: str) -> bool:
    """Whether a name stays in a folder: relative, without a ".." or a symbolic link that leads out of it."""
    try:
        target = os.path.realpath(folder / name)
    except (OSError, ValueError):
        return False
    return not Path(name).is_absolute() and target.startswith(f"{os.path.realpath(folder)}/".replace("//", "/"))


def json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: it cannot be read, or holds none; names the file.
    """
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    return found


def json_lines(path: Path, **required: type) -> Iterator[tuple[str, dict]]:
    """Lines of a log and the objects in them; complete ones only, since a killed run may leave half of its last one.

    Args:
        path: where there is no file, there are no lines.
        required: a key that every object has, and its type.

    Raises:
        UserError: a line that holds something else; names it.
    """
    lines = path.read_text(errors="replace").split("\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or any(type(row.get(key)) is not kind for key, kind in required.items()):
            raise UserError(f"{path}: line {number} is damaged; remove it, or move the file away")
        yield f"{line}\n", row
