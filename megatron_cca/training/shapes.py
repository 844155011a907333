"""The shapes of a run's rows, as far as its configuration fixes them; no torch, no Megatron."""

from __future__ import annotations

from megatron_cca.config import Config
from megatron_cca.models import resolve_architecture
from megatron_cca.models.architecture import sequence_multiple
from megatron_cca.models.image_vocabulary import ImageVocabulary, Vocabulary


def rows_per_sample(config: Config) -> int:
    """Rows of one sample, as the objective says."""
    return config.objective.rows_per_sample


def rows_per_microbatch(config: Config) -> int:
    """Rows of one forward pass."""
    return config.training.micro_batch_size * rows_per_sample(config)


def head_support(config: Config, vocabulary: Vocabulary) -> range:
    """The ids that log-probabilities are normalised over, as ``objective.normalization`` says.

    Args:
        config: of the run.
        vocabulary: of its model, whose ids have a meaning where normalization is ``image``.
    """
    if config.objective.normalization == "vocabulary":
        return range(vocabulary.output_size)
    assert isinstance(vocabulary, ImageVocabulary)
    return vocabulary.visual_ids


def shared_multiple(config: Config) -> int:
    """What the length of rows must be a multiple of, whatever they are padded to, so that ranks can share them."""
    return sequence_multiple(config.parallel, 1)


def fixed_row_length(config: Config) -> int | None:
    """The one length that rows can have; None if the configuration leaves room for several."""
    multiple = sequence_multiple(config.parallel, config.data.pad_to_multiple_of)
    architecture = resolve_architecture(config.model)
    longest = architecture.max_position_embeddings
    if architecture.position_embedding == "rope_2d":
        # Each has the prefix and a whole grid, of which the last code is only predicted.
        return -(-(longest - 1) // multiple) * multiple
    return multiple if multiple <= longest < 2 * multiple else None
