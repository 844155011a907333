"""The configuration of a run: its keys (``schema``), and how YAML and command lines are read (``load``, ``texts``).

Nothing here imports torch or Megatron, so that a mistyped key is refused in a fraction of a second.
"""

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
from megatron_cca.keys import effects

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
