"""What a configuration says about the reference, with its nulls filled in; no torch, no Megatron."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron_cca.config import Config, TrainingConfig


def dropout_key(config: Config) -> str | None:
    """The kind of dropout that is on, the first if both are: each pass draws its own masks. None if neither is."""
    kinds = ("hidden_dropout", "attention_dropout")
    return next((key for key in kinds if getattr(config.model, key) > 0), None)


def has_own_weights(config: Config) -> bool:
    """Whether the reference is a second model in this job's memory."""
    return config.reference.strategy in ("resident", "offload")


def same_weights(config: Config) -> bool:
    """Whether policy and reference start from the same weights."""
    own, pretrained = config.reference.checkpoint, config.training.pretrained_checkpoint
    return own is None or (pretrained is not None and Path(own).resolve() == Path(pretrained).resolve())


def reference_settings(config: Config) -> TrainingConfig:
    """How the reference's forward pass is to be built: the policy's settings but for precision and recomputation."""
    own, policy = config.reference, config.training
    # Delayed scaling learns from earlier passes of training; a frozen model takes its scales from the tensor at hand.
    inherited = "tensorwise" if policy.fp8_recipe == "delayed" else policy.fp8_recipe
    return replace(
        policy,
        precision=own.precision or policy.precision,
        fp8_recipe=own.fp8_recipe or inherited,
        recompute_granularity=None,
    )


def uses_reference_pass(config: Config) -> bool:
    """Whether each step has a forward pass of the frozen model."""
    return config.objective.needs_reference and config.reference.strategy != "cached"


def settings_by_key(config: Config) -> dict[str, TrainingConfig]:
    """How each model of the run computes, under the key that its precision is configured with."""
    settings = {"training.precision": config.training}
    if uses_reference_pass(config):
        settings["reference.precision"] = reference_settings(config)
    return settings
