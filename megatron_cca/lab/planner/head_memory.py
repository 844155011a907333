"""Bytes of the log-probabilities (parallel/sequence_logps.py): hidden states, three numbers a token, a tile."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_cca.config import Config
from megatron_cca.lab.planner.activations import FP32, LayerShape, norm_kept
from megatron_cca.lab.planner.sizes import Sizes
from megatron_cca.parallel.tile_sizes import block_width, chunk_size_of, tile_sizes

INT64 = 8


@dataclass(frozen=True)
class HeadShape:
    """The LM head of one rank.

    Attributes:
        layer: the layers' shape.
        selected: image tokens of a microbatch on this rank.
        rows, width: of a tile.
        on_gpu: whether half-precision products sum in fp32 by themselves, in place: with Transformer Engine, or torch
            2.10 or newer.
        is_padded: whether the last tile runs into rows that pad the vocabulary.
        is_gathered: whether sequence parallelism makes a whole copy of the hidden states.
    """

    layer: LayerShape
    selected: float
    rows: float
    width: float
    on_gpu: bool
    is_padded: bool
    is_gathered: bool


def head_shape(config: Config, sizes: Sizes, layer: LayerShape, *, on_gpu: bool) -> HeadShape:
    """Of the run's."""
    tiles, words = tile_sizes(on_gpu=on_gpu), math.ceil(sizes.words)
    return HeadShape(
        layer=layer,
        selected=sizes.image_tokens,
        rows=min(chunk_size_of(config.training.logps_chunk_size, on_gpu=on_gpu), sizes.image_tokens),
        width=min(block_width(words, tiles), words),
        on_gpu=on_gpu,
        is_padded=_runs_over(config, sizes, tiles.multiple),
        is_gathered=config.parallel.sequence_parallel,
    )


def _runs_over(config: Config, sizes: Sizes, multiple: int) -> bool:
    """Whether the last tile of some rank has rows that do not count."""
    is_whole = config.objective.normalization == "vocabulary"
    return (sizes.architecture.vocabulary.output_size if is_whole else math.ceil(sizes.words)) % multiple > 0


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
    """Alive in the backward pass: while a tile is made, or at its end, when the whole gradient is handed on.

    The weight's gradient is in Megatron's buffer, and what is handed on in its place holds nothing.
    """
    layer = head.layer
    selected, gradient = (size * head.selected * layer.hidden for size in (layer.size, FP32))
    is_half = layer.size != FP32
    tile, at_tile = FP32 * head.rows * head.width, _operands(head)
    if is_half:
        # The tile in half precision.
        at_tile += layer.size * head.rows * head.width if head.on_gpu else 0
    # A copy of the last tile's rows, whose padding is 0.
    at_tile += layer.size * layer.hidden * head.width if head.is_padded else 0
    at_end = layer.size * (layer.tokens + is_half * head.selected) * layer.hidden
    # Where products do not sum in fp32 by themselves the tile is one piece of memory, held to the end.
    is_held = not (is_half and head.on_gpu)
    working = tile + max(at_tile, at_end) if is_held else max(tile + at_tile, at_end)
    return selected + gradient + working + 3 * FP32 * head.selected


def _operands(head: HeadShape) -> float:
    """A CPU makes fp32 copies of the factors of a half-precision product."""
    if head.on_gpu or head.layer.size == FP32:
        return 0
    return FP32 * head.layer.hidden * (head.rows + head.width)
