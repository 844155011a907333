"""Import checkpoints from Hugging Face, export them, and verify them: exact, one piece in memory at a time."""

from megatron_cca.checkpoint.huggingface.exporting import export_checkpoint
from megatron_cca.checkpoint.huggingface.importing import import_checkpoint
from megatron_cca.checkpoint.huggingface.verifying import (
    LogitComparison,
    TensorComparison,
    compare_logits,
    compare_tensors,
    open_both,
)

__all__ = [
    "LogitComparison",
    "TensorComparison",
    "compare_logits",
    "compare_tensors",
    "export_checkpoint",
    "import_checkpoint",
    "open_both",
]
