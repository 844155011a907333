"""What a training run costs, in passes of one row through the model: a forward is 1, its backward 2."""

from __future__ import annotations

from megatron_cca.config import Config

_FORWARD, _FORWARD_BACKWARD = 1, 3


def units_per_sample(config: Config) -> int:
    """3 for plain likelihood, 8 for every objective that compares pairs with a reference.

    Each row passes through the policy, forward and backward, and through the reference, forward.
    """
    objective = config.objective
    return objective.rows_per_sample * (_FORWARD_BACKWARD + _FORWARD * objective.needs_reference)


def run_units(config: Config | None) -> int:
    """Of a whole run; 0 where nothing is trained."""
    if config is None:
        return 0
    return config.training.train_iters * config.training.global_batch_size * units_per_sample(config)
