"""The choice between core attention of Transformer Engine and of torch. Needs no torch, no Megatron.

Transformer Engine computes attention with FlashAttention or cuDNN. Neither ever holds the ``S x S`` scores in memory.
If neither supports a case, Transformer Engine computes it unfused: with scores in memory, without context parallelism.
In these cases torch's ``scaled_dot_product_attention`` is better. It pads heads to a multiple of 8, and computes fp32
in tiles, too. The other layers are still Transformer Engine's. FP8 products, CUDA graphs and overlaps do not depend on
the core attention.
"""

from __future__ import annotations

from megatron_cca.config import ModelConfig, Precision
from megatron_cca.models.architecture import Architecture

# FlashAttention 2 to 4 and cuDNN all support these heads in training, on any GPU since Ampere. Support of larger heads
# depends on GPU and versions: get_attention_backend, nvte_get_fused_attn_backend of Transformer Engine 2.11 to 2.20.
_MULTIPLE, _LARGEST = 8, 128


def unfused_because(channels: int, precision: Precision) -> str | None:
    """Return why Transformer Engine has no fused attention for heads of ``channels``. None if it has."""
    if precision == "fp32":
        return "fp32"
    if channels % _MULTIPLE:
        return f"heads of {channels} channels, no multiple of {_MULTIPLE}"
    if channels > _LARGEST:
        return f"heads of {channels} channels, more than {_LARGEST}"
    return None


def has_engine_attention(transformer_impl: str, channels: int, precision: Precision) -> bool:
    """Return whether a model uses Transformer Engine's core attention if Transformer Engine is installed.

    Args:
        transformer_impl: ``model.transformer_impl``. With ``auto``, only fused attention is used.
        channels: number of channels of a head.
        precision: precision of the computation.
    """
    if transformer_impl == "auto":
        return unfused_because(channels, precision) is None
    return transformer_impl == "transformer_engine"


def keeps_scores(model: ModelConfig, architecture: Architecture, precision: Precision) -> bool:
    """Return whether each layer of such a model keeps its ``S x S`` scores for backward."""
    channels = architecture.kv_channels
    is_unfused = unfused_because(channels, precision) is not None
    return is_unfused and has_engine_attention(model.transformer_impl, channels, precision)
