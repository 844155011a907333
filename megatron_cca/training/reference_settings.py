"""The settings of the reference in a configuration, with nulls filled in. No torch, no Megatron."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron_cca.config import Config, TrainingConfig


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


def settings_by_key(config: Config) -> dict[str, TrainingConfig]:
    """Return the settings of each model of the run, by the key of its precision."""
    settings = {"training.precision": config.training}
    if uses_reference_pass(config):
        settings["reference.precision"] = reference_settings(config)
    return settings
