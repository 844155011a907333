"""Bytes of the log-probabilities (parallel/sequence_logps.py): hidden states, three numbers a token, a tile."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_cca.config import Config
from megatron_cca.planner.activations import FP32, LayerShape, norm_kept
from megatron_cca.planner.sizes import Sizes

# Words in a tile on a GPU and on a CPU: parallel/sequence_logps.py, which a search need not wait for.
TILE_WIDTH = {True: 16_384, False: 2_048}
INT64 = 8


@dataclass(frozen=True)
class HeadShape:
    """The LM head of one rank.

    Attributes:
        layer: the layers' shape.
        selected: image tokens of a microbatch on this rank.
        weights: numbers in this rank's rows.
        rows, width: of a tile.
        on_gpu: whether half-precision products sum in fp32 by themselves.
        is_gathered: whether sequence parallelism makes a whole copy of the hidden states.
    """

    layer: LayerShape
    selected: float
    weights: float
    rows: float
    width: float
    on_gpu: bool
    is_gathered: bool


def head_shape(config: Config, sizes: Sizes, layer: LayerShape, *, on_gpu: bool) -> HeadShape:
    """Of the run's."""
    return HeadShape(
        layer=layer,
        selected=sizes.image_tokens,
        weights=sizes.head_weights,
        rows=min(config.training.logps_chunk_size, sizes.image_tokens),
        width=min(TILE_WIDTH[on_gpu], sizes.words),
        on_gpu=on_gpu,
        is_gathered=config.parallel.sequence_parallel,
    )


def head_kept(head: HeadShape) -> float:
    """The final norm, the whole hidden states, and of each image token its place, word, largest logit and sum."""
    layer = head.layer
    gathered = layer.size * layer.tokens * layer.hidden if head.is_gathered else 0
    return norm_kept(layer) + gathered + (2 * INT64 + 2 * FP32) * head.selected


def head_forward(head: HeadShape) -> float:
    """Alive while the forward tiles are made."""
    selected = head.layer.size * head.selected * head.layer.hidden
    return selected + FP32 * head.rows * head.width + _operands(head) + 5 * FP32 * head.selected


def head_backward(head: HeadShape) -> float:
    """Alive in the backward pass: while a tile is made, or at its end, when the whole gradients are handed on."""
    layer = head.layer
    selected, gradient = (size * head.selected * layer.hidden for size in (layer.size, FP32))
    is_half = layer.size != FP32
    tile, at_tile = FP32 * head.rows * head.width, _operands(head)
    if is_half:
        # The tile in half precision; on a GPU a product in fp32, too, before it is added.
        at_tile += FP32 * layer.hidden * max(head.rows, head.width) if head.on_gpu else 0
        at_tile += layer.size * head.rows * head.width if head.on_gpu else 0
    at_end = layer.size * (layer.tokens * layer.hidden + max(is_half * head.selected * layer.hidden, head.weights))
    # Where products do not sum in fp32 by themselves the tile is one piece of memory, held to the end.
    is_held = not (is_half and head.on_gpu)
    working = tile + max(at_tile, at_end) if is_held else max(tile + at_tile, at_end)
    return selected + gradient + working + 3 * FP32 * head.selected


def _operands(head: HeadShape) -> float:
    """A CPU makes fp32 copies of the factors of a half-precision product."""
    if head.on_gpu or head.layer.size == FP32:
        return 0
    return FP32 * head.layer.hidden * (head.rows + head.width)
