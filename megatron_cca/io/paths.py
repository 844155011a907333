"""Paths as a person types them, and the folders that libraries write to: caches, and the one for temporary files.

``~`` and ``~name`` at the beginning are a home folder. A shell variable that nothing has replaced is refused.
Everything else is taken as typed. Names inside a user's data files are not typed paths, and this rule is not for them.

A fault of these folders is no fault of the user's data. It becomes one line, which names the folder and the variable
that sets it.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_cca.errors import SurroundingsError, UserError, shortened

_VARIABLE = re.compile(r"\$(?:[A-Za-z_]\w*|\{[^{}/]*\})", re.ASCII)
# What Linux takes, in bytes.
LONGEST_NAME, _LONGEST_PATH = 255, 4095
_SHOWN = 120
_FULL = (errno.ENOSPC, errno.EDQUOT)
_HOME, _TEMPORARY = "HOME", "TMPDIR"
# Per cache: the variable whose folder it lies in where its own variable is not set, and its name there.
_CACHES = {
    "HF_DATASETS_CACHE": ("HF_HOME", "datasets"),
    "HF_MODULES_CACHE": ("HF_HOME", "modules"),
    "HF_HOME": ("XDG_CACHE_HOME", "huggingface"),
    "TORCH_HOME": ("XDG_CACHE_HOME", "torch"),
    "TORCH_EXTENSIONS_DIR": ("XDG_CACHE_HOME", "torch_extensions"),
    "TORCHINDUCTOR_CACHE_DIR": (_TEMPORARY, "torchinductor_"),
    "TRITON_CACHE_DIR": (_HOME, ".triton"),
    "MPLCONFIGDIR": ("XDG_CONFIG_HOME", "matplotlib"),
    "XDG_CACHE_HOME": (_HOME, ".cache"),
    "XDG_CONFIG_HOME": (_HOME, ".config"),
}
# Too wide to be named where a library has a variable of its own.
_WIDE = ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", _HOME, _TEMPORARY)
# Names that Python and torch give their own temporary files. All other names are the user's.
_TEMPORARY_NAMES = re.compile(r"tmp[a-z0-9_]{8}|(pymp-|torchelastic_|torchinductor_|matplotlib-|megatron_cca_).*")
_PROBE_BYTES = 4096
# Variables that a launcher sets for the processes of a job.
_NUMBERS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


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


@dataclass(frozen=True)
class LibraryFolder:
    """A folder that a library writes to, and the variable that sets it."""

    folder: Path
    variable: str

    def fault(self, error: OSError) -> SurroundingsError:
        """Return the error to raise for an error of the file system."""
        problem = "is full" if error.errno in _FULL else "cannot be written"
        return SurroundingsError(
            f"{self.variable}: {self.folder} {problem} ({error.strerror or error}); set {self.variable} to a folder "
            f"that can be written{' and has room' if error.errno in _FULL else ''}"
        )


def check_surroundings() -> None:
    """Refuse to start where every program would fail.

    Raises:
        SurroundingsError: the current folder is gone, no temporary folder can be written, a launcher's variable is no
            number.
    """
    for name in _NUMBERS:
        if not (_given(name) or "0").isdecimal():
            raise SurroundingsError(
                f"{name}: must be a whole number, found {_given(name)!r}; torchrun sets it, or unset it"
            )
    _check_current_folder()
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        raise _no_temporary_folder(error) from None


def leave_without_current_folder() -> None:
    """End the process with one line and status 2 if the current folder no longer exists."""
    try:
        _check_current_folder()
    except SurroundingsError as error:
        print(f"megatron_cca: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def check_cache(variable: str) -> None:
    """Refuse a cache that cannot be written, before a library needs it. The folder is made.

    Args:
        variable: an environment variable that sets a cache.

    Raises:
        SurroundingsError: names the folder and what to set.
    """
    place = _place(variable)
    error = refusal(place.folder)
    if error is not None:
        raise place.fault(error)


def surroundings_fault(error: BaseException, cache: str | None = None) -> SurroundingsError | None:
    """Return the fault of the surroundings behind an error. None means that the error has another reason.

    Args:
        error: what a library raised. Its causes are searched, too.
        cache: the variable of the cache that is being filled, for a full disk whose error names no file.
    """
    for cause in _causes(error):
        if isinstance(cause, SurroundingsError):
            return cause
        if isinstance(cause, FileNotFoundError) and "No usable temporary directory" in str(cause):
            return _no_temporary_folder(cause)
        if isinstance(cause, OSError):
            place = _place_of(cause, cache)
            # An unreadable file may lie in a cache, such as a model's own.
            if place is not None and (cause.errno in _FULL or refusal(place.folder) is not None):
                return place.fault(cause)
    return None


def refusal(folder: Path, *, make: bool = True) -> OSError | None:
    """Return the error that writing into a folder raises. None means that it can be written.

    Args:
        folder: it need not exist.
        make: whether to make it. If not, and it is missing, the nearest existing parent is tried. Nothing is left.
    """
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        while not folder.is_dir():
            if os.path.lexists(folder):
                return NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
            folder = folder.parent
        handle, name = tempfile.mkstemp(prefix=".megatron_cca_", dir=folder)
        try:
            os.write(handle, bytes(_PROBE_BYTES))
        finally:
            os.close(handle)
            os.unlink(name)  # noqa: PTH108 - a name, not a path
    except OSError as error:
        return error
    return None


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


def _check_current_folder() -> None:
    try:
        Path.cwd()
    except FileNotFoundError:
        raise SurroundingsError("the current folder has been removed; change to one that exists") from None


def _place(variable: str) -> LibraryFolder:
    """Return where a variable leads, and which variable to set.

    That is the variable itself, or one above it that was set to another place.
    """
    above, name = _CACHES[variable]
    if given := _given(variable):
        return LibraryFolder(Path(given).absolute(), variable)
    if above not in _CACHES:
        root = Path(tempfile.gettempdir()) if above == _TEMPORARY else _home()
        return LibraryFolder(root / name, variable)
    upper = _place(above)
    is_narrow = above not in _WIDE or _given(above) is not None
    return LibraryFolder(upper.folder / name, upper.variable if is_narrow else variable)


def _given(name: str) -> str | None:
    return os.environ.get(name) or None if name in (*_CACHES, *_NUMBERS) else None


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:
        return Path("/")


def _place_of(error: OSError, cache: str | None) -> LibraryFolder | None:
    """Return the narrowest place that an error's file lies in."""
    if error.filename is None:
        return _place(cache) if cache is not None and error.errno in _FULL else None
    file = Path(os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else "").absolute()
    places = [_place(variable) for variable in _CACHES]
    temporary = Path(tempfile.gettempdir())
    if file.is_relative_to(temporary) and _TEMPORARY_NAMES.fullmatch((*file.relative_to(temporary).parts, "")[0]):
        places.append(LibraryFolder(temporary, _TEMPORARY))
    holding = [place for place in places if file.is_relative_to(place.folder)]
    if holding:
        return max(holding, key=lambda place: len(place.folder.parts))
    # Parents are made first: the error then names one of them.
    led_to = [place for place in places if _given(place.variable) and place.folder.is_relative_to(file)]
    return min(led_to, key=lambda place: len(place.folder.parts), default=None)


def _no_temporary_folder(error: OSError) -> SurroundingsError:
    tried = (error.strerror or str(error)).partition(" in ")[2]
    return SurroundingsError(
        f"{_TEMPORARY}: no temporary folder can be written, of {tried}; set {_TEMPORARY} to a folder that can be"
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    found: BaseException | None = error
    while found is not None and found not in seen:
        yield found
        seen.append(found)
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)
