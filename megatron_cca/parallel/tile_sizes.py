"""Sizes of the tiles in which the LM head is applied. Needs no torch, because the planner uses it, too.

A tile is a chunk of tokens times a block of words. Both sizes depend on the device. On a CPU, a tile fits in the cache.
On a GPU, it keeps the whole GPU busy. ``benchmarks/logps.md`` has the measurements.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class TileSizes:
    """The tiles of one kind of device.

    Attributes:
        chunk_size: tokens in a tile, if the configuration does not set it.
        width: largest number of words in a tile.
        multiple: the last tile ends at a multiple of this number of words, if the weight has enough rows.
    """

    chunk_size: int
    width: int
    multiple: int


CPU = TileSizes(chunk_size=1024, width=2048, multiple=1)
# GPU products are fastest if every row of an operand begins at a multiple of 16 bytes. The chunk of 4,096 is an
# estimate, not a measurement: each chunk reads and writes the whole gradient of the head once.
GPU = TileSizes(chunk_size=4096, width=16384, multiple=128)

_WIDTH_MULTIPLE = 128


def tile_sizes(*, on_gpu: bool) -> TileSizes:
    """Return the tiles of a GPU or of a CPU."""
    return GPU if on_gpu else CPU


def chunk_size_of(configured: int | None, *, on_gpu: bool) -> int:
    """Return the number of tokens in a tile: ``training.logps_chunk_size``, or the device's default if it is null."""
    return tile_sizes(on_gpu=on_gpu).chunk_size if configured is None else configured


def block_width(words: int, sizes: TileSizes) -> int:
    """Return the number of words in a tile. All tiles have this width, but the last can be narrower.

    Args:
        words: number of true words of a rank, 1 or more.
        sizes: tile sizes of the device.
    """
    tiles = -(-words // sizes.width)
    return _rounded_up(-(-words // tiles), _WIDTH_MULTIPLE)


def blocks(words: int, rows: int, sizes: TileSizes) -> Iterator[slice]:
    """Yield the blocks of a rank's rows that hold true words.

    The last block can contain rows that pad the vocabulary, at most up to the next multiple.

    Args:
        words: number of true words of the rank, 0 or more.
        rows: number of rows of its weight, ``words`` or more.
        sizes: tile sizes of the device.
    """
    if words < 1:
        return
    end, width = min(_rounded_up(words, sizes.multiple), rows), block_width(words, sizes)
    yield from (slice(start, min(start + width, end)) for start in range(0, end, width))


def own_part(support: range, first_word: int, rows: int) -> range:
    """Return the rows of a shard of the head that hold words of the support. Empty if there are none.

    Args:
        support: consecutive ids.
        first_word: id of the shard's first row.
        rows: number of rows of the shard.
    """
    start, stop = (min(max(word - first_word, 0), rows) for word in (support.start, support.stop))
    return range(start, stop)


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
