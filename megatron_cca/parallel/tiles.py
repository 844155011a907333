"""The tiles in which the LM head is applied: their sizes, and the operations on a tile of logits.

A tile is a chunk of tokens times a block of ids. Both sizes depend on the device. On a CPU, a tile fits in the cache.
On a GPU, it keeps the whole GPU busy. ``benchmarks/logps.md`` has the measurements.

A tile is fp32 (or fp64) ``[n, width]``: the logits of n tokens for ``width`` neighbouring ids. ``local_targets`` is
int64 ``[n]``: the target's column, or a number outside of ``0 .. width - 1`` if the target is in another tile. This
module runs on every device. ``triton_tiles`` has the same two functions with one pass over the tile.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor


@dataclass(frozen=True)
class TileSizes:
    """The tiles of one kind of device.

    Attributes:
        chunk_size: tokens in a tile, if the configuration does not set it.
        width: largest number of ids in a tile.
        multiple: the last tile ends at a multiple of this number of ids, if the weight has enough rows.
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


def block_width(num_ids: int, sizes: TileSizes) -> int:
    """Return the number of ids in a tile. All tiles have this width, but the last can be narrower.

    Args:
        num_ids: number of true ids of a rank, 1 or more.
        sizes: tile sizes of the device.
    """
    tiles = -(-num_ids // sizes.width)
    return _rounded_up(-(-num_ids // tiles), _WIDTH_MULTIPLE)


def blocks(num_ids: int, rows: int, sizes: TileSizes) -> Iterator[slice]:
    """Yield the blocks of a rank's rows that hold true ids.

    The last block can contain rows that pad the vocabulary, at most up to the next multiple.

    Args:
        num_ids: number of true ids of the rank, 0 or more.
        rows: number of rows of its weight, ``num_ids`` or more.
        sizes: tile sizes of the device.
    """
    if num_ids < 1:
        return
    end, width = min(_rounded_up(num_ids, sizes.multiple), rows), block_width(num_ids, sizes)
    yield from (slice(start, min(start + width, end)) for start in range(0, end, width))


def own_part(support: range, first_id: int, rows: int) -> range:
    """Return the rows of a shard of the head that hold ids of the support. Empty if there are none.

    Args:
        support: consecutive ids.
        first_id: id of the shard's first row.
        rows: number of rows of the shard.
    """
    start, stop = (min(max(end - first_id, 0), rows) for end in (support.start, support.stop))
    return range(start, stop)


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def operations_for(device: torch.device) -> ModuleType:
    """Return the module to use for tensors on ``device``: ``triton_tiles`` on a GPU with Triton, else this one."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        return importlib.import_module("megatron_cca.parallel.triton_tiles")
    return sys.modules[__name__]


def absorb(logits: Tensor, local_targets: Tensor, peak: Tensor, sum_exp: Tensor, target_logits: Tensor) -> None:
    """Add a tile to the running softmax of its tokens (online softmax, arXiv 1805.02867). Overwrites ``logits``.

    Args:
        logits: the tile. Its content is lost.
        local_targets: int64 ``[n]``.
        peak: ``[n]``, updated: the largest logit so far. Minus infinity before the first tile.
        sum_exp: ``[n]``, updated: the sum of exp(logit - peak) so far.
        target_logits: ``[n]``, updated if the target is in this tile.
    """
    column, inside = _columns(local_targets, logits.size(1))
    torch.where(inside, logits.gather(1, column).squeeze(1), target_logits, out=target_logits)
    higher = torch.maximum(peak, logits.amax(dim=1))
    sum_exp.mul_(peak.sub_(higher).exp_()).add_(logits.sub_(higher[:, None]).exp_().sum(dim=1))
    peak.copy_(higher)


def logits_gradient(
    logits: Tensor, local_targets: Tensor, peak: Tensor, sum_exp: Tensor, upstream: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return ``upstream * (onehot(target) - softmax(logits))`` of one tile, in ``dtype``. Overwrites ``logits``.

    Args:
        logits: the tile. Its content is lost.
        local_targets: int64 ``[n]``.
        peak: ``[n]``, the largest logit over all ids.
        sum_exp: ``[n]``, the sum of exp(logit - peak) over all ids.
        upstream: ``[n]``, the gradient of each token's log-probability.
        dtype: dtype of the result.
    """
    # Use exp(logit - peak) / sum_exp. With logits of 1e4, logsumexp in exp(logit - logsumexp) loses its digits.
    gradient = logits.sub_(peak[:, None]).exp_().mul_((-upstream / sum_exp)[:, None])
    column, inside = _columns(local_targets, logits.size(1))
    gradient.scatter_add_(1, column, (upstream * inside)[:, None])
    return gradient.to(dtype)


def _columns(local_targets: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return a valid column ``[n, 1]`` for every token, and whether it is the target's column, bool ``[n]``."""
    inside = (local_targets >= 0) & (local_targets < width)
    return local_targets.clamp(0, width - 1)[:, None], inside
