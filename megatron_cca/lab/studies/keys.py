"""What determines a result, as a short hash; the layout of the ranks is not in it, it changes nothing but rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_cca.checkpoint import layout
from megatron_cca.config import Config
from megatron_cca.config.load import FORMER_OBJECTIVE_KEYS, config_to_dict
from megatron_cca.data import DIGITS
from megatron_cca.data.manifest import fingerprint, read_manifest
from megatron_cca.effects import effects
from megatron_cca.lab.studies.tasks import digest
from megatron_cca.models import explicit


def training_contents(config: Config, base: str | None) -> dict[str, Any]:
    """What determines a training run.

    Args:
        config: of the run, seed included.
        base: the key of what it starts from; None for random weights.

    Raises:
        UserError: no token shards where the configuration says they are.
    """
    tree = config_to_dict(explicit(config))
    # So that studies which a former version began go on.
    tree["objective"] = FORMER_OBJECTIVE_KEYS | tree["objective"]
    for key, effect in effects(config).items():
        section, _, name = key.partition(".")
        if not effect.study:
            del tree[section][name]
    tree = {section: keys for section, keys in tree.items() if keys}
    paths = [config.data.path, config.validation.path]
    names = [name for path in paths if path is not None for name in ([path] if isinstance(path, str) else path)]
    return {"config": tree, "base": base, "data": [_data_key(name) for name in names]}


def _data_key(name: str) -> str:
    # The digits' shards are made when they are first needed, always the same.
    return name if name == DIGITS else fingerprint(read_manifest(Path(name)))


def checkpoint_key(checkpoint: str, option: str) -> str:
    """Of a checkpoint that the study did not make: its place and its summary.

    Raises:
        UserError: no whole checkpoint there.
    """
    folder = layout.resolve(checkpoint, option)
    return digest({"folder": str(folder.resolve()), "summary": layout.read_summary(folder, option)})


def mark(name: str | Path) -> list[Any]:
    """A name, and what tells whether the file or folder behind it was changed: its size and time, if there is one.

    Of FILE.py:FUNCTION it is the file. A folder's own time changes with the names in it.
    """
    file, _, function = str(name).rpartition(":")
    path = Path(file if function and file.endswith(".py") else name)
    if not path.exists():
        return [str(name)]
    status = path.stat()
    return [str(name), str(path.resolve()), status.st_size if path.is_file() else None, status.st_mtime_ns]
