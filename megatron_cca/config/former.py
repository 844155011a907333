"""Translate configurations that earlier versions wrote, in checkpoints and reference caches, to today's keys.

A key that a version did not have gets its default. The version did just that, unless ``WITHOUT`` says otherwise. Keys
that no longer exist stand in ``RENAMED`` or ``DROPPED``. This module imports no torch and no Megatron.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_cca.config.schema import Config
from megatron_cca.keys import values
from megatron_cca.objectives.base import DEFAULT, keys_of

# section.key: what versions without this key did, where that is not its default today.
WITHOUT = {
    # Runs without this key trained on the digits.
    "data.path": "digits",
    # Training waited for each save.
    "training.async_save": False,
    # The size was the same on all devices.
    "training.logps_chunk_size": 1024,
}
# Former section.key: today's name.
RENAMED: dict[str, str] = {}
# Former section.key without a successor: what a user who still types it should do.
DROPPED: dict[str, str] = {}
# Earlier versions wrote these keys and their defaults for every objective.
OBJECTIVE_KEYS = {"beta": 0.02, "negative_weight": 1.0}


def values_without() -> dict[str, Any]:
    """Return, by ``section.key``, what versions without the key did."""
    return values(Config()) | WITHOUT


def of_today(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration that an earlier version wrote, in today's keys.

    Args:
        saved: section -> key -> value, as written. A key that no version wrote stays, and is refused later.
    """
    found: dict[str, Any] = {}
    for section, keys in saved.items():
        if not isinstance(keys, dict):
            found[section] = keys
            continue
        for name, value in keys.items():
            former = f"{section}.{name}"
            if former not in DROPPED:
                _put(found, RENAMED.get(former, former), value)
    for key, value in WITHOUT.items():
        _put(found, key, value)
    return found


def with_own_objective_keys(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a configuration without the :data:`OBJECTIVE_KEYS` that its objective does not have."""
    section = tree.get("objective") if isinstance(tree, Mapping) else None
    if not isinstance(section, dict):
        return tree
    known = keys_of(section.get("name", DEFAULT)) or OBJECTIVE_KEYS
    kept = {key: value for key, value in section.items() if key in known or key not in OBJECTIVE_KEYS}
    return {**tree, "objective": kept}


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set a key, unless the tree has it already."""
    section, _, name = key.partition(".")
    keys = tree.setdefault(section, {})
    if isinstance(keys, dict):
        keys.setdefault(name, value)
