"""How tables and plots call keys, values and metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_KEYS = {
    "objective.beta": "β",
    "objective.negative_weight": "λ",
    "sampling.guidance_scale": "s",
    "sampling.temperature": "T",
}
_AXES = {
    "objective.beta": "β",
    "objective.negative_weight": "λ (negative_weight)",
    "sampling.guidance_scale": "guidance scale s",
    "sampling.temperature": "temperature",
    "optimizer.lr": "learning rate",
}
# name -> (heading, decimals); in the order of the tables.
METRICS = {
    "accuracy": ("accuracy", 3),
    "inception_score": ("IS", 2),
    "fid": ("FID", 2),
    "sfid": ("sFID", 2),
    "kid": ("KID", 4),
    "precision": ("precision", 3),
    "recall": ("recall", 3),
    "positive_log_ratio": ("log-ratio", 2),
}


def key_name(key: str) -> str:
    """Short: ``objective.beta`` is β, ``optimizer.lr`` is lr."""
    return _KEYS.get(key, key.rpartition(".")[2])


def axis_name(key: str) -> str:
    """Of a diagram's axis."""
    return _AXES.get(key, key.rpartition(".")[2])


def value_name(value: Any) -> str:
    """Numbers as short as they go."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def settings_name(values: Mapping[str, Any]) -> str:
    """Such as "β 0.15, lr 0.002"."""
    return ", ".join(f"{key_name(key)} {value_name(value)}" for key, value in values.items())
