"""Megatron's token files, read so that a file which is cut short is an error and not the end of the process."""

from __future__ import annotations

import errno
import os
import weakref
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import _BinReader


class OpenFile(_BinReader):
    """Reads a ``.bin`` file that stays open.

    A memory map would answer with SIGBUS where the file has become shorter or its disk is gone. To open the file for
    each sample would miss it once its folder is removed.

    Args:
        path: of the file.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, dtype: type[np.number], count: int, offset: int) -> np.ndarray:
        """``count`` items from a byte on.

        Raises:
            OSError: the disk does not answer, or the file ends before them.
        """
        found = np.empty(count, dtype)
        rest = memoryview(found).cast("B") if count else memoryview(b"")
        while rest:
            size = os.preadv(self._descriptor, [rest], offset)
            if not size:
                raise OSError(errno.ENODATA, "is shorter than it was when the run began", str(self._path))
            rest, offset = rest[size:], offset + size
        return found
