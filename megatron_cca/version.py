"""The version of this code and of installed packages."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from megatron_cca import __version__

_ROOT = Path(__file__).resolve().parents[1]
_TIMEOUT_SECONDS = 10


@cache
def code_version() -> str:
    """Return the package's version. In a git checkout it has the commit, and ``.dirty`` where files differ from it."""
    if not (_ROOT / ".git").exists():
        return __version__
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        return f"{__version__}+g{commit}{'.dirty' if _git('status', '--porcelain', '--untracked-files=no') else ''}"
    except (OSError, subprocess.SubprocessError):
        return __version__


def installed_versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the versions of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(_ROOT), *arguments]
    options = {"capture_output": True, "text": True, "timeout": _TIMEOUT_SECONDS, "check": True}
    return subprocess.run(command, **options).stdout.strip()  # noqa: S603 - a list without user input
