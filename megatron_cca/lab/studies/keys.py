"""Short hashes of all inputs of a result.

The layout of the ranks is not among them. It changes only rounding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_cca.checkpoint import layout
from megatron_cca.config import Config
from megatron_cca.config.former import OBJECTIVE_KEYS
from megatron_cca.config.load import config_to_dict
from megatron_cca.data import DIGITS
from megatron_cca.data.manifest import fingerprint, read_manifest
from megatron_cca.effects import effects
from megatron_cca.lab.studies.tasks import digest
from megatron_cca.models import explicit


def training_contents(config: Config, base: str | None) -> dict[str, Any]:
    """Return all inputs of a training run as plain data.

    Args:
        config: configuration of the run, seed included.
        base: the key of the base; None for random weights.

    Raises:
        UserError: the configuration names a folder without token shards.
    """
    tree = config_to_dict(explicit(config))
    # A former version's studies must continue with the same keys.
    tree["objective"] = OBJECTIVE_KEYS | tree["objective"]
    for key, effect in effects(config).items():
        section, _, name = key.partition(".")
        if not effect.study:
            del tree[section][name]
    tree = {section: keys for section, keys in tree.items() if keys}
    paths = [config.data.path, config.validation.path]
    names = [name for path in paths if path is not None for name in ([path] if isinstance(path, str) else path)]
    return {"config": tree, "base": base, "data": [_data_key(name) for name in names]}


def _data_key(name: str) -> str:
    # The shards of the digits are created at first use. They are always the same.
    return name if name == DIGITS else fingerprint(read_manifest(Path(name)))


def checkpoint_key(checkpoint: str, option: str) -> str:
    """Return the key of a checkpoint from outside the study.

    It covers the checkpoint's folder and its summary.

    Raises:
        UserError: the folder has no complete checkpoint.
    """
    folder = layout.resolve(checkpoint, option)
    return digest({"folder": str(folder.resolve()), "summary": layout.read_summary(folder, option)})


def mark(name: str | Path) -> list[Any]:
    """Return a name with the size and the time of its file or folder, which show a change.

    Of FILE.py:FUNCTION it is the file. The time of a folder changes with the names in it. Without a file or folder it
    is the name alone.
    """
    file, _, function = str(name).rpartition(":")
    path = Path(file if function and file.endswith(".py") else name)
    if not path.exists():
        return [str(name)]
    status = path.stat()
    return [str(name), str(path.resolve()), status.st_size if path.is_file() else None, status.st_mtime_ns]
