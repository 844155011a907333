"""Condition Contrastive Alignment for autoregressive image models, on Megatron-Core."""

__version__ = "0.1.0"
