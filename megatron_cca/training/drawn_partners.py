"""Check who drew the partners, for objectives that take the reference's own images as second images of pairs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_cca.checkpoint import layout
from megatron_cca.checkpoint.summary import IMPORTED_FROM, recorded_fingerprint
from megatron_cca.config import Config
from megatron_cca.errors import UserError
from megatron_cca.training.resuming import PRETRAINED, REFERENCE

if TYPE_CHECKING:
    from megatron_cca.data.shards import TokenData, TokenShards


def check_drawn(config: Config, data: Iterable[TokenData]) -> None:
    """Refuse partners that other weights drew than those that the reference has. Reads no weights.

    Args:
        config: of a run whose objective has ``reference_draws_partners``.
        data: of training and validation, with their partners.

    Raises:
        UserError: the message names the folder, both weights and what would be right.
    """
    for shards, drawn in _partners(data):
        if drawn is None:
            continue
        drew = f"{shards.key}: {shards.folder} was drawn by weights {drawn['weights']} of {drawn.get('checkpoint')}"
        key, path = _reference(config)
        if path is None:
            raise UserError(
                f"{drew}, but the reference of {config.objective.name}, which must draw them, has random weights; name "
                f"that checkpoint in {PRETRAINED}"
            )
        folder = layout.resolve(path, key)
        own = recorded_fingerprint(folder, key)
        if drawn["weights"] != own and not _was_imported_from(folder, drawn.get("checkpoint"), key):
            raise UserError(
                f"{drew}, but the reference of {config.objective.name}, which must draw them, has weights {own} "
                f"({key}: {path}); draw with generate --checkpoint {path}, or name in {key} the "
                "checkpoint that drew them"
            )


def lines_on_undrawn(config: Config, data: Iterable[TokenData]) -> list[str]:
    """Return a line for each folder of partners that does not say who drew it. Arguments as for :func:`check_drawn`."""
    return [
        f"{shards.key}: {shards.folder} does not say which weights drew it; {config.objective.name} takes its images "
        "for the reference's own"
        for shards, drawn in _partners(data)
        if drawn is None
    ]


def _partners(data: Iterable[TokenData]) -> Iterator[tuple[TokenShards, dict[str, Any] | None]]:
    """Yield each folder with second images once, and what it says of the model that drew it, None without weights."""
    folders = {shards.folder: shards for tokens in data for shards in tokens.partners or tokens.shards}
    for shards in folders.values():
        drawn = shards.manifest.get("drawn")
        yield shards, drawn if isinstance(drawn, dict) and isinstance(drawn.get("weights"), str) else None


def _reference(config: Config) -> tuple[str, str | None]:
    own = config.reference.checkpoint
    return (PRETRAINED, config.training.pretrained_checkpoint) if own is None else (REFERENCE, own)


def _was_imported_from(folder: Path, drew: object, key: str) -> bool:
    """Return whether a checkpoint was imported from the folder that drew. Their files, and so fingerprints, differ."""
    source = layout.read_summary(folder, key).get(IMPORTED_FROM)
    origin = source.get("folder") if isinstance(source, dict) else None
    return isinstance(drew, str) and isinstance(origin, str) and Path(drew).resolve() == Path(origin).resolve()
