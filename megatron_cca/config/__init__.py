"""The configuration of a run: its keys (``schema``), how they are read (``load``), and the examples' files.

Nothing here imports torch or Megatron, so that a mistyped key is refused in a fraction of a second.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Annotated

from megatron_cca.config.schema import (
    Config,
    DataConfig,
    FaultsConfig,
    KernelsConfig,
    LoggingConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Precision,
    ReferenceConfig,
    TrainingConfig,
    ValidationConfig,
)
from megatron_cca.io.options import Option
from megatron_cca.io.paths import path_option
from megatron_cca.keys import effects

# A link to examples/ in a checkout. setup.py installs the files themselves.
_FOLDER = Path(__file__).resolve().parents[1] / "examples"


def example(name: str) -> Path:
    """Return the file of an example, such as ``emu3_tiny_cca``."""
    return _FOLDER / f"{name}.yaml"


def example_names(folder: str = "") -> list[str]:
    """Return the names of the examples, sorted. ``folder`` is one below theirs, such as ``studies``."""
    return sorted(path.stem for path in (_FOLDER / folder).glob("*.yaml"))


def config_option(text: str, folder: str = "") -> Path:
    """Return the file that ``--config`` names: the file at this path, else the example of this name.

    Raises:
        argparse.ArgumentTypeError: there is neither, or the text cannot be a path. The message lists the examples.
    """
    path = path_option(text)
    if path.is_file() or path.name != text or path.suffix:
        return path
    names = example_names(folder)
    if text not in names:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a file nor an example; the examples are {', '.join(names)}"
        )
    return example(f"{folder}/{text}" if folder else text)


ConfigFile = Annotated[Path, Option(metavar="FILE|NAME", convert=config_option)]
StudyFile = Annotated[Path, Option(metavar="FILE|NAME", convert=partial(config_option, folder="studies"))]


__all__ = [
    "Config",
    "DataConfig",
    "FaultsConfig",
    "KernelsConfig",
    "LoggingConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "Precision",
    "ReferenceConfig",
    "TrainingConfig",
    "ValidationConfig",
]

# Raise at import if a key does not declare what it affects.
effects(Config())
