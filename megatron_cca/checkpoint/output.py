"""Output folders: nothing is replaced unasked, a full disk is one line, and what is half-written never looks whole."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_cca.errors import UserError

OPTION = "--output"


def check_output(output: Path, partial: Path, *, overwrite: bool, replaceable: Callable[[set[str]], bool]) -> None:
    """Refuse a folder that holds something which is not to be replaced.

    Args:
        output: the folder that the user named.
        partial: where an interrupted attempt may have left something; does not count.
        overwrite: whether the user allows replacing.
        replaceable: told the names in the folder, whether they are a former output of the same kind.

    Raises:
        UserError: names the folder and what it holds.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"{OPTION}: {output} is a file; give a folder")
    names = {path.name for path in output.iterdir()} - {partial.name} if output.is_dir() else set()
    if not names:
        return
    some = f"{sorted(names)[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}"
    if not overwrite:
        raise UserError(f"{OPTION}: {output} already holds {some}; give an empty folder or --overwrite")
    if not replaceable(names):
        raise UserError(
            f"{OPTION}: {output} holds {some}: not what --overwrite is meant to replace; give another folder"
        )


def check_apart(output: Path, source: Path, option: str) -> None:
    """Refuse to write into the folder that is read, around it or inside it."""
    inner, outer = output.resolve(), source.resolve()
    if inner == outer or inner.is_relative_to(outer) or outer.is_relative_to(inner):
        raise UserError(f"{OPTION}: {output} and {option} {source} are in each other's way; give another folder")


@contextmanager
def staging(partial: Path, needed_bytes: int) -> Iterator[None]:
    """Make an empty folder to write in; it disappears again if the block fails.

    Raises:
        UserError: too little space, or anything the file system refuses; names the folder or file.
    """
    missing = [folder for folder in (partial.parent, *partial.parent.parents) if not folder.exists()]
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        free = shutil.disk_usage(partial).free
        if free < needed_bytes:
            raise UserError(
                f"{OPTION}: the disk of {partial.parent} has {free / 1e9:.2f} GB free, {needed_bytes / 1e9:.2f} GB are "
                "needed"
            )
        yield
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in missing:
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()
        if isinstance(error, OSError):
            raise UserError(_told(error, partial)) from None
        raise


def _told(error: OSError, partial: Path) -> str:
    where = error.filename or partial.parent
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{OPTION}: the disk of {partial.parent} is full ({error.strerror}); free some space or give another"
    return f"{OPTION}: cannot write {where}: {error.strerror or error}"
