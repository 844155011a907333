"""Refuse to continue a run as another run. No torch, no Megatron."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_cca.checkpoint import layout
from megatron_cca.checkpoint.summary import recorded_fingerprint, saved_config
from megatron_cca.config import Config
from megatron_cca.errors import UserError
from megatron_cca.keys import OnResume, effects, values
from megatron_cca.models import explicit
from megatron_cca.training import has_own_weights

PRETRAINED = "training.pretrained_checkpoint"
REFERENCE = "reference.checkpoint"
OUTPUT = "training.output_dir"
# The entry of a checkpoint's summary for the fingerprints of the weights that its run started from.
STARTED_FROM = "started_from"


def check_resume(config: Config, *, start_exists: bool = True) -> None:
    """Refuse to continue a run as another one. A folder without checkpoints holds no run to continue.

    Args:
        config: of the run.
        start_exists: whether the weights that the run starts from exist already.

    Raises:
        UserError: a key that must not change has changed, or the run starts from other weights. Names the key.
    """
    root = Path(config.training.output_dir) / layout.FOLDER
    newest = layout.newest_complete(root)
    if newest is None:
        # If there are only damaged checkpoints, newest_whole tries them all and reports it.
        return
    folder = layout.iteration_folder(root, newest)
    saved = saved_config(folder, OUTPUT)
    for key, ours, theirs in _changed(config, saved):
        if key != PRETRAINED:
            raise UserError(
                f"{key}: {ours!r}, but the run in {config.training.output_dir} was started with {theirs!r}; set it so, "
                "or choose another training.output_dir"
            )
    if start_exists:
        _check_started_from(config, saved, folder)


def started_from(config: Config) -> dict[str, str | None]:
    """Return, for a checkpoint's summary, a fingerprint of each checkpoint that the run starts from, or None.

    Raises:
        UserError: a named checkpoint does not exist or is not whole.
    """
    named = {PRETRAINED: config.training.pretrained_checkpoint, REFERENCE: config.reference.checkpoint}
    return {key: None if path is None else _fingerprint(path, key) for key, path in named.items()}


def _changed(config: Config, saved: Config) -> Iterator[tuple[str, object, object]]:
    ours, theirs = values(explicit(config)), values(saved)
    for key, effect in effects(config).items():
        if effect.resume is OnResume.REFUSED and ours[key] != theirs.get(key):
            yield key, ours[key], theirs.get(key)


def _fingerprint(path: str, key: str) -> str:
    return recorded_fingerprint(layout.resolve(path, key), key)


def _check_started_from(config: Config, saved: Config, folder: Path) -> None:
    """Refuse a start from other weights: the reference would be another one from now on.

    A folder may have moved, and a path may lead to newer weights. Therefore fingerprints are compared. Checkpoints of
    earlier versions have none. For them the paths of their run lead to the weights, if these still exist.
    """
    recorded = layout.read_summary(folder, OUTPUT).get(STARTED_FROM)
    if not isinstance(recorded, dict):
        recorded = _still_there(saved)
    ours, theirs = config.training.pretrained_checkpoint, saved.training.pretrained_checkpoint
    uses_own = config.objective.needs_reference and has_own_weights(config)
    keys = [PRETRAINED] if ours != theirs or (uses_own and config.reference.checkpoint is None) else []
    keys += [REFERENCE] if uses_own and config.reference.checkpoint is not None else []
    found = started_from(config)
    for key in keys:
        if key in recorded and recorded[key] != found[key]:
            path = ours if key == PRETRAINED else config.reference.checkpoint
            raise UserError(
                f"{key}: {path!r} has other weights than the checkpoint that the run in {config.training.output_dir} "
                f"was started with ({theirs if key == PRETRAINED else saved.reference.checkpoint!r}); name that one, "
                "or choose another training.output_dir"
            )


def _still_there(saved: Config) -> dict[str, str | None]:
    found = {}
    for key, path in ((PRETRAINED, saved.training.pretrained_checkpoint), (REFERENCE, saved.reference.checkpoint)):
        try:
            found[key] = None if path is None else _fingerprint(path, key)
        except UserError:
            continue
    return found
