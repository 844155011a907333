"""Put an exported folder's files where the user wants them, all or none, in place of a former export's.

Every export lists its files in a hidden file beside them; only those are ever replaced. ``config.json`` goes first and
comes last: without it nothing takes the folder for a model.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from megatron_cca import __version__
from megatron_cca.io.external_files import is_file_name

RECORD, PARTIAL, FORMER = ".megatron_cca_export.json", ".partial", ".former"
UNFINISHED = frozenset({PARTIAL, FORMER})
_FIRST_AND_LAST = ("config.json", RECORD)


def record(folder: Path) -> None:
    """List the files of a finished export, which are all there are in ``folder``, in the hidden file."""
    names = sorted(path.name for path in folder.iterdir())
    (folder / RECORD).write_text(json.dumps({"version": __version__, "files": names}, indent=1) + "\n")


def listed(folder: Path) -> list[str]:
    """The files of the export in ``folder``, the hidden one included; none where there is no export."""
    try:
        names = json.loads((folder / RECORD).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    mine = isinstance(names, list) and all(is_file_name(name) for name in names)
    return [*names, RECORD] if mine else []


def place(output: Path) -> None:
    """Move what lies in ``output/.partial`` up into ``output``; on any failure everything is as it was before."""
    partial, former = output / PARTIAL, output / FORMER
    former.mkdir()
    try:
        _move(listed(output), output, former, first=True)
        _move(listed(partial), partial, output, first=False)
    except BaseException:
        undo(output)
        raise
    partial.rmdir()
    shutil.rmtree(former, ignore_errors=True)


def undo(output: Path) -> None:
    """Take back a placement that did not come to its end, even if the process was killed; else do nothing."""
    partial, former = output / PARTIAL, output / FORMER
    if not former.is_dir():
        return
    # The list of the new files is moved last: where it is still below, they have not all arrived.
    for name in listed(partial):
        if not (partial / name).exists():
            (output / name).unlink(missing_ok=True)
    if listed(partial):
        _move([path.name for path in former.iterdir()], former, output, first=False)
    shutil.rmtree(former)


def _move(names: list[str], source: Path, target: Path, *, first: bool) -> None:
    def order(name: str) -> int:
        late = _FIRST_AND_LAST.index(name) + 1 if name in _FIRST_AND_LAST else 0
        return -late if first else late

    for name in sorted(names, key=order):
        if (source / name).exists():
            _replace(source / name, target / name)


_replace = Path.replace
