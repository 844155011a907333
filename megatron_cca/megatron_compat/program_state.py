"""Global state that Megatron-LM's training program sets up, and that layers need.

Megatron-Core 0.19.2 needs the number of microbatches when it captures CUDA graphs. Transformer Engine's layers (2.11 to
2.19) need buffers to overlap tensor-parallel communication with matrix products.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from megatron.core import num_microbatches_calculator as calculator
from megatron.core import parallel_state

from megatron_cca.megatron_compat.relied_on import ReliedOn

_CALCULATOR = "megatron.core.num_microbatches_calculator"
_BASE = "transformer_engine.pytorch.module.base"
RELIED_ON = (
    ReliedOn(f"{_CALCULATOR}._GLOBAL_NUM_MICROBATCHES_CALCULATOR", "says whether one has been set already"),
    ReliedOn(
        f"{_CALCULATOR}.init_num_microbatches_calculator",
        "is called with positions",
        parameters=(
            *("rank", "rampup_batch_size", "global_batch_size", "micro_batch_size", "data_parallel_size"),
            *("decrease_batch_size_if_needed", "step_batch_size_schedule", "seq_length"),
        ),
    ),
    ReliedOn(
        "megatron.core.transformer.cuda_graphs.TECudaGraphHelper",
        "captures, after having asked for the number of microbatches",
        takes=("model", "config", "seq_length", "micro_batch_size", "optimizers"),
        has=("capture_finished", "create_cudagraphs", "cuda_graph_set_manual_hooks"),
    ),
    ReliedOn("megatron.core.transformer.cuda_graphs", "asks for it", says=("get_num_microbatches()",)),
    ReliedOn(
        f"{_BASE}.initialize_ub",
        "makes the buffers",
        takes=("shape", "tp_size", "quantization_modes", "bootstrap_backend"),
    ),
    ReliedOn(f"{_BASE}.UserBufferQuantizationMode", "the kinds of buffers", has=("FP8", "NONE")),
)


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
