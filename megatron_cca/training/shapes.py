"""The shapes of a run's rows, as far as its configuration fixes them; no torch, no Megatron."""

from __future__ import annotations

import math

from megatron_cca.config import Config
from megatron_cca.models import resolve_architecture


def rows_per_microbatch(config: Config) -> int:
    """Rows of one forward pass: with pairs, a positive and a negative one for each sample."""
    return config.training.micro_batch_size * (1 if config.objective.name == "next_token" else 2)


def sequence_multiple(config: Config) -> int:
    """What the length of all rows is a multiple of: ``data.pad_to_multiple_of``, and :func:`shared_multiple`."""
    return math.lcm(shared_multiple(config), config.data.pad_to_multiple_of)


def shared_multiple(config: Config) -> int:
    """What it must be a multiple of, so that every rank holds equally long parts of a sequence."""
    parallel = config.parallel
    # Two pieces on each context-parallel rank: an early and a late one, for equal work under a causal mask.
    context = 2 * parallel.context_parallel_size if parallel.context_parallel_size > 1 else 1
    return context * (parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1)


def fixed_row_length(config: Config) -> int | None:
    """The one length that rows can have; None if the configuration leaves room for several."""
    multiple = sequence_multiple(config)
    longest = resolve_architecture(config.model).max_position_embeddings
    return multiple if multiple <= longest < 2 * multiple else None
