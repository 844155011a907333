"""Megatron-Core 0.19.2's indexed files of tokens, written and read where its own classes fall short.

Its readers end the process where a file is cut short, and open a file for each sample. Its writer collects garbage for
each part that is joined, and its index has no check of its own.
"""

from __future__ import annotations

import errno
import os
import shutil
import struct
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import (
    _INDEX_HEADER,
    DType,
    IndexedDataset,
    IndexedDatasetBuilder,
    _BinReader,
)


def open_indexed(prefix: Path) -> IndexedDataset:
    """Open the files ``prefix``.bin and ``prefix``.idx; the first stays open.

    Raises:
        OSError: one cannot be opened; when a sample is read also: it is shorter than it was.
    """
    found = IndexedDataset(str(prefix), mmap=False)
    found.bin_reader = _OpenFile(prefix.with_name(f"{prefix.name}.bin"))
    return found


class _OpenFile(_BinReader):
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


def index_header(dtype: type[np.number], count: int) -> bytes:
    """Return how an index of ``count`` sequences begins, each of which is a document of its own."""
    return _INDEX_HEADER + struct.pack("<QBQQ", 1, DType.code_from_dtype(dtype), count, count + 1)


def append_tokens(builder: IndexedDatasetBuilder, path: Path, lengths: Sequence[int]) -> None:
    """Append another ``.bin`` file's sequences, each a document of its own.

    Megatron's ``add_index`` does the same, but collects garbage every time: hours for a data set of many parts.
    """
    first = len(builder.sequence_lengths)
    builder.sequence_lengths.extend(lengths)
    builder.document_indices.extend(range(first + 1, first + len(lengths) + 1))
    with path.open("rb") as file:
        shutil.copyfileobj(file, builder.data_file)
