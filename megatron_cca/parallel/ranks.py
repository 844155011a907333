"""Join the job, split it into Megatron's groups, and share the outcome of one rank with all ranks."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cca import platform
from megatron_cca.config import Config
from megatron_cca.errors import SurroundingsError, UserError, one_line


def initialize_distributed(config: Config) -> None:
    """Join the job and split it into Megatron's groups. A second call with the same layout is harmless."""
    # Here, since checkpoints are converted without Megatron-Core.
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    parallel = config.parallel
    if not dist.is_initialized():
        timeout = timedelta(minutes=config.training.distributed_timeout_minutes)
        dist.init_process_group(timeout=timeout, **platform.process_group_options())
    if not parallel_state.model_parallel_is_initialized():
        chunks = parallel.virtual_pipeline_model_parallel_size or 1
        parallel_state.initialize_model_parallel(
            parallel.tensor_model_parallel_size,
            parallel.pipeline_model_parallel_size,
            chunks if chunks > 1 else None,
            context_parallel_size=parallel.context_parallel_size,
            num_distributed_optimizer_instances=config.optimizer.num_distributed_optimizer_instances,
            create_gloo_process_groups=False,
            distributed_timeout_minutes=config.training.distributed_timeout_minutes,
        )
    # CUDA graphs can replay random numbers only from Transformer Engine's tracker.
    captures = config.kernels.cuda_graph_impl != "none"
    model_parallel_cuda_manual_seed(config.training.seed, te_rng_tracker=captures, force_reset_rng=captures)


def attempted_on_rank_0[Answer](action: Callable[[], Answer]) -> tuple[Answer | None, str | None]:
    """Run an action with files on rank 0 only, and send the outcome to all ranks. Collective over all ranks.

    Args:
        action: the function to run. It must return plain data.

    Returns:
        The answer of the action and None, or None and the error of the file system or of a check in one line. The
        same on every rank.
    """
    outcome: list = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except (OSError, SurroundingsError, UserError) as error:
            outcome[1] = described(error)
    dist.broadcast_object_list(outcome)
    return outcome[0], outcome[1]


def largest(value: int) -> int:
    """Return the largest value of all ranks. Needs one small all-reduce."""
    answer = torch.tensor([value], dtype=torch.int32, device=platform.device())
    dist.all_reduce(answer, op=dist.ReduceOp.MAX)
    return int(answer)


def any_rank(condition: bool) -> bool:
    """Return whether the condition is true on at least one rank. Needs one small all-reduce."""
    return largest(int(condition)) == 1


def first_problem(problem: str | None) -> str | None:
    """Return the problem of the lowest rank that has one. None if no rank has one. Collective over all ranks."""
    problems: list = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return next((found for found in problems if found is not None), None)


def described(error: BaseException) -> str:
    """Return an error's message in one line, without a traceback. Includes the file name if the error has one."""
    if isinstance(error, OSError):
        return one_line(": ".join(str(part) for part in (error.filename, error.strerror or error) if part))
    return one_line(" ".join(str(error).split())) or type(error).__name__


def all_finite(values: Tensor) -> bool:
    """Return whether a floating-point tensor holds neither NaN nor infinity. Waits for the device.

    A sum with NaN or infinity is not finite. So one pass is enough, without a mask in memory.
    """
    return bool(torch.isfinite(values.sum(dtype=torch.float32)))
