"""Messages that Megatron-Core 0.19.2 prints on every supported run, and that need no action by the user."""

from __future__ import annotations

import logging
import warnings

_WARNINGS = (
    # This package supports running without them (see adam.py and models/layer_specs.py).
    r"Transformer Engine and Apex are not installed",
    r"Apex is not installed",
    r"full scope is deprecated",
    r"Could not determine rank from torch.distributed",
    r"MimoModelConfig is experimental",
    # Megatron's distributed optimizer reads gradients of views of its buffers on purpose.
    r"The \.grad attribute of a Tensor that is not a leaf Tensor",
    # Megatron's checkpoint reader calls torch's reader on each rank alone, and torch warns about it.
    r"torch\.distributed is disabled, unavailable or uninitialized",
    r"The argument order of load has been changed",
    r"Please use DTensor instead",
)
LOG_RECORDS = {
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "megatron.core.distributed.distributed_data_parallel": "full_param_layout not provided",
    "megatron.core.rerun_state_machine": "State",
    "megatron.core.dist_checkpointing.strategies.torch": "async save is deprecated",
    "megatron.core.dist_checkpointing.strategies.async_utils": "async save is deprecated",
    "torch.utils.cpp_extension": "No CUDA runtime is found",
    # The tracker warns if CPU random numbers change while it forks the GPU's. On a CPU both are one generator.
    "megatron.core.tensor_parallel.random": "CPU RNG state changed",
}


def hide_expected_messages() -> None:
    """Hide the messages above, and no others."""
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name, text in LOG_RECORDS.items():
        logging.getLogger(name).addFilter(lambda record, text=text: text not in record.getMessage())
