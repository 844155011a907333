"""Split tensors into pieces that fit in memory, and show progress in bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

PIECE_BYTES = 64 * 2**20


def row_ranges(shape: Sequence[int], dtype: torch.dtype, piece_bytes: int = PIECE_BYTES) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows that cover a tensor of this shape: at most ``piece_bytes`` each, at least one row."""
    rows = shape[0] if shape else 1
    row_bytes = math.prod(shape[1:]) * dtype.itemsize
    # Rows of no bytes all fit in one piece.
    step = max(1, piece_bytes // row_bytes if row_bytes else rows)
    yield from ((start, min(start + step, rows)) for start in range(0, rows, step))


def num_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Return the size of a tensor in bytes."""
    return math.prod(shape) * dtype.itemsize


class ByteProgress:
    """Progress bar that counts bytes. A context manager."""

    def __init__(self, verb: str, total_bytes: int, *, shown: bool) -> None:
        self._bar = tqdm(
            total=total_bytes, desc=verb, unit="B", unit_scale=True, unit_divisor=1000, disable=None if shown else True
        )

    def __enter__(self) -> ByteProgress:
        return self

    def __exit__(self, *_unused) -> None:
        self._bar.close()

    def watch(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the same pieces, and count each after use."""
        for piece in pieces:
            yield piece
            self.count(piece)

    def watched(self, read: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Return a function that calls ``read`` and counts the tensor that it returns."""

        def reading() -> Tensor:
            piece = read()
            self.count(piece)
            return piece

        return reading

    def count(self, piece: Tensor) -> None:
        """Add the bytes of one piece to the bar."""
        self._bar.update(piece.nbytes)
