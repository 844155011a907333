"""The buffers through which Transformer Engine overlaps tensor-parallel communication with products."""

from __future__ import annotations

from megatron_cca.config import Config
from megatron_cca.megatron_compat.program_state import make_user_buffers
from megatron_cca.models import resolve_architecture
from megatron_cca.training.reference_settings import reference_settings
from megatron_cca.training.shapes import fixed_row_length, rows_per_microbatch

_have_been_made = False


def initialize_user_buffers(config: Config) -> None:
    """Make them for ``parallel.tp_comm_overlap``; once a process, since all its models have the same rows.

    Model parallelism must be initialised, and :func:`device_checks.check_devices` must have let the run through.
    Collective over all ranks.
    """
    global _have_been_made
    if not config.parallel.tp_comm_overlap or _have_been_made:
        return
    precisions = {config.training.precision, reference_settings(config).precision}
    make_user_buffers(user_buffer_shape(config), config.parallel.tensor_model_parallel_size, precisions)
    _have_been_made = True


def user_buffer_shape(config: Config) -> list[int]:
    """``[tokens of a microbatch on a context-parallel rank, hidden size]``."""
    tokens = fixed_row_length(config) * rows_per_microbatch(config) // config.parallel.context_parallel_size
    return [tokens, resolve_architecture(config.model).hidden_size]
