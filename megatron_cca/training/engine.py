"""Prepare Transformer Engine's user buffers for overlaps, and its CUDA graphs of the policy's layers.

The user buffers overlap tensor-parallel communication with matrix products. Megatron's schedules capture Megatron's
graphs (``local``) themselves. This module captures those of Transformer Engine.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.cuda_graphs import TECudaGraphHelper
from megatron.core.utils import get_model_config

from megatron_cca.config import Config
from megatron_cca.megatron_compat.program_state import make_user_buffers, set_number_of_microbatches
from megatron_cca.models import resolve_architecture
from megatron_cca.platform.transfers import without_side_work
from megatron_cca.training import fixed_row_length, reference_settings, rows_per_microbatch

_have_been_made = False


def initialize_user_buffers(config: Config) -> None:
    """Make the user buffers of ``parallel.tp_comm_overlap``, once per process, since all its models have the same rows.

    Model parallelism must be initialised. The run must have passed :func:`kernel_checks.check_devices`. Collective over
    all ranks.
    """
    global _have_been_made
    if not config.parallel.tp_comm_overlap or _have_been_made:
        return
    precisions = {config.training.precision, reference_settings(config).precision}
    make_user_buffers(user_buffer_shape(config), config.parallel.tensor_model_parallel_size, precisions)
    _have_been_made = True


def user_buffer_shape(config: Config) -> list[int]:
    """Return ``[tokens of a microbatch on a context-parallel rank, hidden size]``."""
    tokens = fixed_row_length(config) * rows_per_microbatch(config) // config.parallel.context_parallel_size
    return [tokens, resolve_architecture(config.model).hidden_size]


class GraphCapture:
    """The capture of CUDA graphs. It happens once, after ``kernels.cuda_graph_warmup_steps`` steps of this process.

    Args:
        config: of a run that has passed :func:`kernel_checks.check_overlaps`.
        policy: the model chunks of the policy.
        optimizer: the optimizer of the policy.
    """

    def __init__(self, config: Config, policy: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
        self._policy, self._gathers = policy, config.optimizer.overlap_param_gather
        self._steps_left = config.kernels.cuda_graph_warmup_steps
        set_number_of_microbatches(config.training.global_batch_size, config.training.micro_batch_size)
        self._helper = TECudaGraphHelper(
            model=policy,
            config=get_model_config(policy[0]),
            seq_length=fixed_row_length(config),
            micro_batch_size=rows_per_microbatch(config),
            optimizers=[optimizer],
        )

    def before_step(self) -> None:
        """Capture the graphs once the warm-up is over. Call it before each step's forward pass. Collective."""
        if self._helper.capture_finished():
            return
        if self._steps_left:
            self._steps_left -= 1
            return
        # The hooks that gather updated weights must not be captured. Megatron then calls them beside the graphs.
        for chunk in self._policy if self._gathers else ():
            chunk.disable_forward_pre_hook(param_sync=False)
        # In Transformer Engine's capture mode, another thread that reads a batch would end the capture.
        with without_side_work():
            self._helper.create_cudagraphs()
        for chunk in self._policy if self._gathers else ():
            chunk.enable_forward_pre_hook()
        if self._gathers:
            self._helper.cuda_graph_set_manual_hooks()
