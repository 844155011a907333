"""The shapes of a run's rows, as far as its configuration fixes them. No torch, no Megatron."""

from __future__ import annotations

from megatron_cca.config import Config
from megatron_cca.models import resolve_architecture
from megatron_cca.models.architecture import sequence_multiple
from megatron_cca.models.image_vocabulary import ImageVocabulary, Vocabulary


def rows_per_sample(config: Config) -> int:
    """Return the number of rows of one sample, as the objective declares it."""
    return config.objective.rows_per_sample


def rows_per_microbatch(config: Config) -> int:
    """Return the number of rows of one forward pass."""
    return config.training.micro_batch_size * rows_per_sample(config)


def head_support(config: Config, vocabulary: Vocabulary) -> range:
    """Return the ids that log-probabilities are normalised over, as ``objective.normalization`` chooses.

    Args:
        config: of the run.
        vocabulary: of its model. The ids must have a meaning if the normalization is ``image``.
    """
    if config.objective.normalization == "vocabulary":
        return range(vocabulary.output_size)
    assert isinstance(vocabulary, ImageVocabulary)
    return vocabulary.visual_ids


def shared_multiple(config: Config) -> int:
    """Return the number that row lengths must be a multiple of, so that ranks can share rows, apart from padding."""
    return sequence_multiple(config.parallel, 1)


def fixed_row_length(config: Config) -> int | None:
    """Return the only length that rows can have. Return None if the configuration allows several lengths."""
    multiple = sequence_multiple(config.parallel, config.data.pad_to_multiple_of)
    architecture = resolve_architecture(config.model)
    longest = architecture.max_position_embeddings
    if architecture.position_embedding == "rope_2d":
        # Each row has the prefix and a whole grid. The last code is only predicted.
        return -(-(longest - 1) // multiple) * multiple
    return multiple if multiple <= longest < 2 * multiple else None
