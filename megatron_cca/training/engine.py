"""What Transformer Engine has to have ready: buffers for overlaps, and CUDA graphs of the policy's layers.

Through the buffers it overlaps tensor-parallel communication with products. Megatron's schedules capture graphs of
their own; Transformer Engine captures these.
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
from megatron_cca.training.reference_settings import reference_settings
from megatron_cca.training.shapes import fixed_row_length, rows_per_microbatch

_have_been_made = False


def initialize_user_buffers(config: Config) -> None:
    """Make them for ``parallel.tp_comm_overlap``; once a process, since all its models have the same rows.

    Model parallelism must be initialised, and :func:`kernel_checks.check_devices` must have let the run through.
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


class GraphCapture:
    """Captures once, after ``kernels.cuda_graph_warmup_steps`` steps of this process.

    Args:
        config: of a run that :func:`kernel_checks.check_overlaps` has let through.
        policy: its model chunks.
        optimizer: theirs.
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
        """Called before each step's forward pass of the policy. Collective over all ranks."""
        if self._helper.capture_finished():
            return
        if self._steps_left:
            self._steps_left -= 1
            return
        # What gathers updated weights must not be captured; from now on Megatron calls it beside the graphs.
        for chunk in self._policy if self._gathers else ():
            chunk.disable_forward_pre_hook(param_sync=False)
        # Transformer Engine captures in the mode in which a batch that is being read would end the capture.
        with without_side_work():
            self._helper.create_cudagraphs()
        for chunk in self._policy if self._gathers else ():
            chunk.enable_forward_pre_hook()
        if self._gathers:
            self._helper.cuda_graph_set_manual_hooks()
