"""Read and write Megatron-Core 0.19.2's indexed token files, where its own classes are not good enough.

Its readers end the process if a file was truncated, or open a file for each sample. Its writer collects garbage for
each part that it joins. Its index has no checksum.
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
    """Open the files ``prefix``.bin and ``prefix``.idx. The ``.bin`` file stays open.

    Raises:
        OSError: a file cannot be opened. Reading a sample later raises it if the file has become shorter.
    """
    found = IndexedDataset(str(prefix), mmap=False)
    found.bin_reader = _OpenFile(prefix.with_name(f"{prefix.name}.bin"))
    return found


def index_header(dtype: type[np.number], count: int) -> bytes:
    """Return the header of an index of ``count`` sequences. Each sequence is one document."""
    return _INDEX_HEADER + struct.pack("<QBQQ", 1, DType.code_from_dtype(dtype), count, count + 1)


def append_tokens(builder: IndexedDatasetBuilder, path: Path, lengths: Sequence[int]) -> None:
    """Append the sequences of another ``.bin`` file. Each sequence is one document.

    Megatron's ``add_index`` does the same, but collects garbage every time. This takes hours if there are many parts.
    """
    first = len(builder.sequence_lengths)
    builder.sequence_lengths.extend(lengths)
    builder.document_indices.extend(range(first + 1, first + len(lengths) + 1))
    with path.open("rb") as file:
        shutil.copyfileobj(file, builder.data_file)


class _OpenFile(_BinReader):
    """Reader of a ``.bin`` file that stays open.

    A memory map ends the process with SIGBUS if the file has become shorter or its disk is gone. Opening the file for
    each sample fails after its folder is removed.

    Args:
        path: path of the file.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, dtype: type[np.number], count: int, offset: int) -> np.ndarray:
        """Return ``count`` items, beginning at the byte ``offset``.

        Raises:
            OSError: the disk does not answer, or the file is too short.
        """
        found = np.empty(count, dtype)
        rest = memoryview(found).cast("B") if count else memoryview(b"")
        while rest:
            size = os.preadv(self._descriptor, [rest], offset)
            if not size:
                raise OSError(errno.ENODATA, "is shorter than it was when the run began", str(self._path))
            rest, offset = rest[size:], offset + size
        return found
