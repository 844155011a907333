"""Read what earlier versions wrote down of their configuration, in checkpoints and reference caches, with today's keys.

A key that a version did not have gets its default: that is what the version did, unless ``WITHOUT`` says otherwise. A
key that is no more stands in ``RENAMED`` or ``DROPPED``. No torch, no Megatron.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_cca.config.schema import Config
from megatron_cca.effects import values

# section.key: what versions that do not name it did, where that is not its default today.
WITHOUT = {
    # Runs that name no data were of the digits.
    "data.path": "digits",
    # Training waited for each save.
    "training.async_save": False,
    # Tiles had one size on all devices.
    "training.logps_chunk_size": 1024,
}
# Former section.key: today's name.
RENAMED: dict[str, str] = {}
# Former section.key that has no successor: what who still types it should do.
DROPPED: dict[str, str] = {}


def values_without() -> dict[str, Any]:
    """Return, by ``section.key``, what versions that do not name the key did."""
    return values(Config()) | WITHOUT


def of_today(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration that an earlier version wrote down, in today's keys.

    Args:
        saved: section -> key -> value, as it was written. What no version wrote is left as it is, to be refused.
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


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set a key that the tree does not have yet."""
    section, _, name = key.partition(".")
    keys = tree.setdefault(section, {})
    if isinstance(keys, dict):
        keys.setdefault(name, value)
