"""What a step works on: the shape of its rows."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_cca.config import Config
from megatron_cca.errors import UserError
from megatron_cca.models import resolve_architecture
from megatron_cca.models.architecture import Architecture, grid_side, longest_row, sequence_multiple
from megatron_cca.models.emu3.grammar import grid_text, sequence_length


@dataclass(frozen=True)
class Workload:
    """The rows of every microbatch, all alike.

    Attributes:
        seq_length: S, the positions of a row, padding included.
        image_tokens: of those, the positions whose targets are image tokens; only they pass through the LM head.
    """

    seq_length: int
    image_tokens: int


@dataclass(frozen=True)
class ImageShape:
    """The images to train on.

    Attributes:
        height, width: the grid of visual tokens.
        caption_tokens: of the longest caption.
    """

    height: int
    width: int
    caption_tokens: int


def image_workload(config: Config, shape: ImageShape) -> Workload:
    """The rows that a run has on such images, padded as its layout and ``data.pad_to_multiple_of`` ask.

    Raises:
        UserError: more positions than the model has, or another grid than its positions are for.
    """
    architecture = resolve_architecture(config.model)
    multiple = sequence_multiple(config.parallel, config.data.pad_to_multiple_of)
    # A token is not an input of its own prediction, hence one less.
    seq_length = -(-(_row_length(architecture, shape) - 1) // multiple) * multiple
    limit = longest_row(architecture, multiple)
    if seq_length > limit:
        raise UserError(
            f"--image-grid: {shape.height}x{shape.width} with captions of {shape.caption_tokens} tokens needs "
            f"{seq_length} positions, model.max_position_embeddings is {limit}; raise that, or give smaller images"
        )
    return Workload(seq_length, shape.height * shape.width)


def _row_length(architecture: Architecture, shape: ImageShape) -> int:
    if architecture.position_embedding == "rope":
        # Emu3's tokenizer makes one token of every character of the grid's text.
        words = len(grid_text(shape.height, shape.width))
        return sequence_length(shape.caption_tokens, words, shape.height, shape.width)
    side = grid_side(architecture)
    if (shape.height, shape.width) != (side, side):
        raise UserError(
            f"--image-grid: {shape.height}x{shape.width}, but the model has positions for {side}x{side} alone; leave "
            f"it out, or set model.max_position_embeddings, such as {architecture.prefix_tokens + shape.height**2}"
        )
    return architecture.prefix_tokens + side**2
