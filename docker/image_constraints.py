"""Install into an image that brings torch and what is built against it, without touching any of that.

``write CONSTRAINTS OUTPUT`` notes, before anything is installed, what must stay as it is, as constraints for pip; and
takes the project's tried versions as upper bounds of the rest, so that an older NumPy of the image finds packages that
fit it. ``check OUTPUT`` says afterwards whether it has stayed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path

from packaging.version import Version

KEPT = ("apex", "flash-attn", "numpy", "triton")
KEPT_PREFIXES = ("cuda-", "nvidia-", "torch", "transformer-engine")


def main(arguments: list[str]) -> None:
    """Run ``write`` or ``check``; a check that fails ends with status 1."""
    match arguments:
        case ["write", constraints, output]:
            lines = image_constraints(pins(Path(constraints).read_text()), installed())
            Path(output).write_text("".join(f"{line}\n" for line in lines))
        case ["check", written]:
            problems = moved(Path(written).read_text(), installed())
            if problems:
                sys.exit("\n".join(problems))
        case _:
            sys.exit(__doc__)


def installed() -> dict[str, str]:
    """Name (normalised) -> version of all that Python finds."""
    return {_normal(one.metadata["Name"]): one.version for one in distributions()}


def pins(text: str) -> dict[str, str]:
    """Name (normalised) -> version of the ``name==version`` lines of a constraints file."""
    found = re.findall(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE)
    return {_normal(name): version for name, version in found}


def image_constraints(ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    """Lines for pip: what the image has built stays, everything else is at most as new as what was tried.

    Args:
        ours: the project's pins.
        theirs: what the image has.
    """
    kept = {name: version for name, version in theirs.items() if _is_kept(name, version)}
    rest = {name: version for name, version in ours.items() if name not in kept}
    newer = {name for name in rest if name in theirs and Version(theirs[name]) > Version(rest[name])}
    exact = [f"{name}=={version}" for name, version in kept.items()]
    return sorted(exact + [f"{name}<={version}" for name, version in rest.items() if name not in newer])


def moved(written: str, now: Mapping[str, str]) -> list[str]:
    """What is no longer as :func:`image_constraints` noted it, a line each; and a second DALI."""
    before = pins(written)
    lines = [f"{name} was {old}, is {now.get(name)}" for name, old in before.items() if now.get(name) != old]
    dalis = [name for name in now if re.fullmatch(r"nvidia-dali-cuda\d+", name)]
    return lines + ([f"several DALIs: {', '.join(dalis)}"] if len(dalis) > 1 else [])


def _is_kept(name: str, version: str) -> bool:
    # A local version label (+nv25.11, +cu130, +git...) is no registry's: the image's makers built it.
    return name in KEPT or name.startswith(KEPT_PREFIXES) or "+" in version


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    main(sys.argv[1:])
