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
