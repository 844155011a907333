"""Find the members of a tar. Only headers are read."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from megatron_cca.data.sources.foreign_text import printable
from megatron_cca.errors import UserError
from megatron_cca.io.external_files import kind_of_file

_BLOCK = tarfile.BLOCKSIZE
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class Member(NamedTuple):
    """A file in a tar: its name, and the place of its bytes."""

    name: str
    offset: int
    size: int


def tar_members(path: Path) -> Iterator[Member]:
    """Yield the files in a tar, in its order.

    Raises:
        UserError: a compressed, damaged or truncated tar, or a member that is a link, a device or sparse, or whose name
            is absolute or has "..". The message names the tar and the member.
    """
    shown = printable(str(path))
    try:
        _refuse_compressed(path, shown)
        with tarfile.open(path, "r:") as tar:
            yield from _checked(tar, shown)
            _refuse_truncated(tar, shown)
    except UserError:
        raise
    # A forged header can make tarfile raise nearly anything.
    except Exception as error:
        kind = kind_of_file(path)
        if kind not in (None, "a tar"):
            raise UserError(f"{shown} is no tar but {kind}; give it the name of what it is") from None
        raise UserError(
            f"{shown} is truncated, damaged or not a tar ({printable(str(error))}); copy it again"
        ) from None


def _checked(tar: tarfile.TarFile, shown: str) -> Iterator[Member]:
    end = os.fstat(tar.fileobj.fileno()).st_size
    while (member := tar.next()) is not None:
        # The tar would keep every header that it has read.
        tar.members = []
        _refuse_unsafe(member, shown)
        if not 0 <= member.size <= end - member.offset_data:
            raise UserError(f"{shown} is truncated or damaged in member {printable(member.name)}; copy it again")
        if member.isfile():
            yield Member(member.name.removeprefix("./"), member.offset_data, member.size)


def _refuse_compressed(path: Path, shown: str) -> None:
    with path.open("rb") as file:
        start = file.read(8)
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise UserError(f"{shown} is compressed ({name}), which allows no random access; decompress it")


def _refuse_unsafe(member: tarfile.TarInfo, shown: str) -> None:
    where = f"{shown}: member {printable(member.name)}"
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        raise UserError(f"{where} points outside the tar; make the tar again with relative names")
    if member.issparse() or not (member.isfile() or member.isdir()):
        raise UserError(f"{where} is a link, a device or sparse; make the tar again with plain files")


def _refuse_truncated(tar: tarfile.TarFile, shown: str) -> None:
    """Refuse a tar without an end, or with a damaged header. ``tarfile`` takes both for its end."""
    tar.fileobj.seek(tar.offset)
    found = tar.fileobj.read(_BLOCK)
    if len(found) < _BLOCK or found.strip(b"\0"):
        raise UserError(f"{shown} is truncated or damaged after {tar.offset} bytes; copy it again")
