"""Global state that Megatron-LM's training program sets up, and that layers need.

Megatron-Core 0.19.2 needs the number of microbatches when it captures CUDA graphs. Transformer Engine's layers (2.11 to
2.19) need buffers to overlap tensor-parallel communication with matrix products.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from megatron.core import num_microbatches_calculator as calculator
from megatron.core import parallel_state


def set_number_of_microbatches(global_batch_size: int, micro_batch_size: int) -> None:
    """Set the number of microbatches in a step, for Megatron's capture of CUDA graphs. Batch sizes are in samples."""
    if calculator._GLOBAL_NUM_MICROBATCHES_CALCULATOR is not None:
        calculator.unset_num_microbatches_calculator()
    calculator.init_num_microbatches_calculator(
        parallel_state.get_data_parallel_rank(),
        None,
        global_batch_size,
        micro_batch_size,
        parallel_state.get_data_parallel_world_size(),
        False,
    )


def make_user_buffers(shape: Sequence[int], tp_size: int, precisions: Collection[str]) -> None:
    """Make Transformer Engine's communication buffers. Call it once per process. Collective over all ranks.

    Args:
        shape: ``[tokens, hidden size]`` of the tensor that a layer communicates.
        tp_size: number of ranks of a tensor-parallel group.
        precisions: precisions that layers compute in. Only ``fp8`` and ``bf16`` have buffers.
    """
    from transformer_engine.pytorch.module import base

    modes = base.UserBufferQuantizationMode
    wanted = [mode for mode, name in ((modes.FP8, "fp8"), (modes.NONE, "bf16")) if name in precisions]
    base.initialize_ub(shape=list(shape), tp_size=tp_size, quantization_modes=wanted, bootstrap_backend="nccl")
