"""Tensor-parallel building blocks with explicit process groups."""

from megatron_cca.parallel.sequence_logps import sequence_logps, token_logps

__all__ = ["sequence_logps", "token_logps"]
