"""Tensors cut into pieces small enough to hold: what streaming reads, moves and writes at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

PIECE_BYTES = 64 * 2**20


def row_ranges(shape: Sequence[int], dtype: torch.dtype, piece_bytes: int = PIECE_BYTES) -> Iterator[tuple[int, int]]:
    """Ranges of rows of at most ``piece_bytes`` (but one row at least) that cover a tensor of this shape."""
    rows = shape[0] if shape else 1
    row_bytes = math.prod(shape[1:]) * dtype.itemsize
    # Of nothing there may be any number of rows.
    step = max(1, piece_bytes // row_bytes if row_bytes else rows)
    yield from ((start, min(start + step, rows)) for start in range(0, rows, step))


def num_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * dtype.itemsize
