"""Training, from a configuration to a checkpoint. Here: what a configuration alone fixes. No torch, no Megatron."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron_cca.config import Config, TrainingConfig
from megatron_cca.keys import Affects, effects, values
from megatron_cca.models import resolve_architecture
from megatron_cca.models.architecture import sequence_multiple
from megatron_cca.models.image_vocabulary import ImageVocabulary, Vocabulary

_HOW = (Affects.LAST_BITS, Affects.SPEED)


def rows_per_sample(config: Config) -> int:
    """Return the number of rows of one sample, as the objective declares it."""
    return config.objective.rows_per_sample


def pairs_of(config: Config) -> str | None:
    """Return what the rows of a pair are, ``conditions`` or ``images``. Return None if the objective has no pairs."""
    return config.data.pairs or next(iter(config.objective.contrasts), None)


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


def dropout_key(config: Config) -> str | None:
    """Return the key of the dropout that is on, the first one if both are. Return None if neither is."""
    kinds = ("hidden_dropout", "attention_dropout")
    return next((key for key in kinds if getattr(config.model, key) > 0), None)


def has_own_weights(config: Config) -> bool:
    """Return whether the reference is a second model in this job's memory."""
    return config.reference.strategy in ("resident", "offload")


def same_weights(config: Config) -> bool:
    """Return whether policy and reference start from the same weights."""
    own, pretrained = config.reference.checkpoint, config.training.pretrained_checkpoint
    return own is None or (pretrained is not None and Path(own).resolve() == Path(pretrained).resolve())


def reference_settings(config: Config) -> TrainingConfig:
    """Return how to build the reference: the policy's settings, except for precision and recomputation."""
    own, policy = config.reference, config.training
    # Delayed scaling learns from earlier training passes. A frozen model takes its scales from the current tensor.
    inherited = "tensorwise" if policy.fp8_recipe == "delayed" else policy.fp8_recipe
    return replace(
        policy,
        precision=own.precision or policy.precision,
        fp8_recipe=own.fp8_recipe or inherited,
        recompute_granularity=None,
    )


def uses_reference_pass(config: Config) -> bool:
    """Return whether each step has a forward pass of the frozen model."""
    return config.objective.needs_reference and config.reference.strategy != "cached"


def computes_plainly(config: Config) -> bool:
    """Return whether the keys that change only memory, time or rounding have their defaults, and nothing is in FP8.

    ``kernel_checks.py`` then has nothing to refuse.
    """
    own, usual = values(config), values(Config())
    changed = {name for name, one in effects(config).items() if one.affects in _HOW and own[name] != usual[name]}
    is_special = config.optimizer.use_precision_aware_optimizer or "fp8" in (
        one.precision for one in settings_by_key(config).values()
    )
    return not is_special and changed <= {"training.micro_batch_size"}


def settings_by_key(config: Config) -> dict[str, TrainingConfig]:
    """Return the settings of each model of the run, by the key of its precision."""
    settings = {"training.precision": config.training}
    if uses_reference_pass(config):
        settings["reference.precision"] = reference_settings(config)
    return settings
