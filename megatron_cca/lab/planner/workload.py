"""The workload of a step: the shape of its rows."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_cca.config import Config
from megatron_cca.errors import UserError
from megatron_cca.models import resolve_architecture
from megatron_cca.models.architecture import grid_misfit, longest_row, sequence_multiple


@dataclass(frozen=True)
class Workload:
    """The rows of a microbatch, which are all alike.

    Attributes:
        seq_length: S, the positions of a row, padding included.
        image_tokens: the positions whose targets are image tokens; only they pass through the LM head.
    """

    seq_length: int
    image_tokens: int


@dataclass(frozen=True)
class ImageShape:
    """The shape of the training images and of their captions.

    Attributes:
        height, width: the grid of visual tokens.
        caption_tokens: tokens of the longest caption.
    """

    height: int
    width: int
    caption_tokens: int


def image_workload(config: Config, shape: ImageShape) -> Workload:
    """Return the rows that a run has on such images.

    The layout and ``data.pad_to_multiple_of`` decide the padding.

    Raises:
        UserError: more positions than the model has, or a grid that does not suit the model's positions.
    """
    architecture = resolve_architecture(config.model)
    misfit = grid_misfit(architecture, 1, shape.height, shape.width)
    if misfit is not None:
        raise UserError(f"--image-grid: {misfit}")
    vocabulary = architecture.vocabulary
    # Count one token for each character. The tokenizer never merges digits.
    words = len(vocabulary.meta_text(1, shape.height, shape.width))
    ids = vocabulary.sequence_length(shape.caption_tokens, words, shape.height, shape.width)
    multiple = sequence_multiple(config.parallel, config.data.pad_to_multiple_of)
    # The last token is no input. Hence one less.
    seq_length = -(-(ids - 1) // multiple) * multiple
    limit = longest_row(architecture, multiple)
    if seq_length > limit:
        raise UserError(
            f"--image-grid: {shape.height}x{shape.width} with captions of {shape.caption_tokens} tokens needs "
            f"{seq_length} positions, model.max_position_embeddings is {limit}; raise that, or give smaller images"
        )
    return Workload(seq_length, shape.height * shape.width)
