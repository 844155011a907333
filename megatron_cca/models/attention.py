"""Whose core attention a model has where Transformer Engine is at hand; no torch, no Megatron.

Transformer Engine computes attention with FlashAttention or with cuDNN, neither of which ever holds the ``S x S``
scores. What neither takes it computes unfused: scores in memory, no context parallelism. There torch's
``scaled_dot_product_attention`` is better, which fills heads up to a multiple of 8 and computes fp32 in tiles, too. The
other layers stay Transformer Engine's: FP8 products, CUDA graphs and overlaps do not depend on the core attention.
"""

from __future__ import annotations

from megatron_cca.config import ModelConfig, Precision
from megatron_cca.models.architecture import Architecture

# What FlashAttention 2 to 4 and cuDNN all take in training, on any GPU since Ampere. Larger heads depend on GPU and
# versions. Transformer Engine 2.11 to 2.20: get_attention_backend, nvte_get_fused_attn_backend.
_MULTIPLE, _LARGEST = 8, 128


def unfused_because(channels: int, precision: Precision) -> str | None:
    """Say why Transformer Engine has no fused attention for heads of ``channels``; None where it has."""
    if precision == "fp32":
        return "fp32"
    if channels % _MULTIPLE:
        return f"heads of {channels} channels, no multiple of {_MULTIPLE}"
    if channels > _LARGEST:
        return f"heads of {channels} channels, more than {_LARGEST}"
    return None


def has_engine_attention(transformer_impl: str, channels: int, precision: Precision) -> bool:
    """Whether a model's core attention is Transformer Engine's, where that is installed.

    Args:
        transformer_impl: ``model.transformer_impl``; ``auto`` takes it only where it is fused.
        channels: of a head.
        precision: that the model computes in.
    """
    if transformer_impl == "auto":
        return unfused_because(channels, precision) is None
    return transformer_impl == "transformer_engine"


def keeps_scores(model: ModelConfig, architecture: Architecture, precision: Precision) -> bool:
    """Whether each layer of such a model keeps its ``S x S`` scores for backward."""
    channels = architecture.kv_channels
    is_unfused = unfused_because(channels, precision) is not None
    return is_unfused and has_engine_attention(model.transformer_impl, channels, precision)
