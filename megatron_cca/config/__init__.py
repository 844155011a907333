"""The configuration of a run: its keys (``schema``), how they are read (``load``), and the examples' files.

Nothing here imports torch or Megatron, so that a mistyped key is refused in a fraction of a second.
"""

from __future__ import annotations

import argparse
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


def example_names() -> list[str]:
    """Return the names that :func:`example` knows, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def config_option(text: str) -> Path:
    """Return the file that ``--config`` names: the file at this path, else the example of this name.

    Raises:
        argparse.ArgumentTypeError: there is neither, or the text cannot be a path. The message lists the examples.
    """
    path = path_option(text)
    if path.is_file() or path.name != text or path.suffix:
        return path
    if text not in example_names():
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a file nor an example; the examples are {', '.join(example_names())}"
        )
    return example(text)


ConfigFile = Annotated[Path, Option(metavar="FILE|NAME", convert=config_option)]


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
