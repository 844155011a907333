"""A run's configuration: its keys (``schema``), from YAML and command lines (``load``), and texts as typed (``texts``).

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
from megatron_cca.effects import effects

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

# A key that does not say what it affects is found here, before any program does anything.
effects(Config())
