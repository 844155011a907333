"""Folder trees of images."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from megatron_cca.data.sources.texts import PackedStrings, printable, unique_names
from megatron_cca.errors import UserError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


def is_image(name: str) -> bool:
    """Whether a file's name says that it is an image."""
    return Path(name).suffix.lower() in IMAGE_SUFFIXES


def walked(root: Path) -> Iterator[str]:
    """The files below a folder, relative to it, "/" between folders; hidden ones are left out, order is arbitrary.

    Raises:
        UserError: a folder that may not be read, or a symbolic link to one: following it might lead anywhere, and
            not following it would lose its images in silence.
    """
    for folder, folders, files in os.walk(root, onerror=_refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        here = os.path.relpath(folder, root)
        for name in folders:
            if os.path.islink(os.path.join(folder, name)):  # noqa: PTH114, PTH118 - called for every file
                shown = printable(os.path.normpath(os.path.join(root, here, name)))  # noqa: PTH118
                raise UserError(f"{shown} is a symbolic link to a folder, which is not followed; copy it there")
        yield from (os.path.normpath(os.path.join(here, name)) for name in files if not name.startswith("."))  # noqa: PTH118


def _refuse(error: OSError) -> None:
    raise UserError(f"{printable(str(error.filename))}: {error.strerror}; give a folder that may be read")


class ImageTree:
    """The images below a folder, in the order of their paths' bytes.

    Attributes:
        paths: relative to the folder.
        names: the same, printable and unique.

    Raises:
        UserError: no images, or what :func:`walked` refuses.
    """

    def __init__(self, root: Path) -> None:
        found = sorted((path for path in walked(root) if is_image(path)), key=os.fsencode)
        if not found:
            raise UserError(f"{printable(str(root))} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
        self.paths = PackedStrings(found)
        self.names = PackedStrings(unique_names(found))

    def __len__(self) -> int:
        return len(self.paths)

    def digest(self) -> hashlib._Hash:
        """A sha256 of the paths, to be fed with more."""
        return hashlib.sha256(b"%d\0" % len(self) + self.paths.blob)
