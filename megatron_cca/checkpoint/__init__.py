"""Checkpoints in Megatron's distributed format."""
