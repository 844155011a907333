"""Tensors cut into pieces that are small enough to hold, for streaming, and the bar that counts them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

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


class ByteProgress:
    """A bar that counts bytes; a context manager."""

    def __init__(self, verb: str, total_bytes: int, *, shown: bool) -> None:
        self._bar = tqdm(
            total=total_bytes, desc=verb, unit="B", unit_scale=True, unit_divisor=1000, disable=None if shown else True
        )

    def __enter__(self) -> ByteProgress:
        return self

    def __exit__(self, *_unused) -> None:
        self._bar.close()

    def watch(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """The same pieces, counted."""
        for piece in pieces:
            yield piece
            self.count(piece)

    def watched(self, read: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """The same function, its answers counted."""

        def reading() -> Tensor:
            piece = read()
            self.count(piece)
            return piece

        return reading

    def count(self, piece: Tensor) -> None:
        """One more piece is done."""
        self._bar.update(piece.nbytes)
