"""The progress bar of a conversion."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from torch import Tensor
from tqdm import tqdm


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
