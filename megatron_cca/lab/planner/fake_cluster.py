"""One rank of a job of any size in one process: fake process groups, tensors that have shapes but no memory.

Everything is Megatron's and this project's own code; what needs numbers to go on (is it finite? how many image tokens?)
gets the answers of a healthy step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_cca.lab.planner.observer import Observer
from megatron_cca.lab.planner.substitutes import COLLECTIVES, LikeCpu, LikeGpu, patches
from megatron_cca.platform.operations import operating_by

# Marks the answer of torch.any: in a healthy step there is none.
_FOUND = "_answers_whether_there_is_any"


@contextmanager
def fake_job(rank: int, world_size: int) -> Iterator[None]:
    """This process as one rank of a job whose other ranks do not exist; afterwards there is no job.

    Args:
        rank: 0 to ``world_size - 1``.
        world_size: the ranks of the job; each takes a little time for its groups.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@contextmanager
def fake_tensors(image_share: float, *, like_gpu: bool) -> Iterator[Observer]:
    """Inside, tensors have no memory; the observer counts what they would hold and what is sent.

    Args:
        image_share: image tokens of all positions of a row.
        like_gpu: whether to count what a GPU makes, or what a CPU makes.
    """
    observer = _HealthyStep(image_share)
    with ExitStack() as stack:
        for patch in patches(like_gpu=like_gpu):
            stack.enter_context(patch)
        stack.enter_context(operating_by((LikeGpu if like_gpu else LikeCpu)(observer)))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(observer)
        yield observer


class _HealthyStep(Observer):
    """Also answers what needs numbers, as in a step where nothing is wrong."""

    has_numbers = False

    def __init__(self, image_share: float) -> None:
        super().__init__()
        self._image_share = image_share

    def perform(self, function, args: tuple, kwargs: dict):
        """Answer, or run the operation."""
        if function is torch.ops.aten._local_scalar_dense.default:
            return _healthy_number(args[0])
        if function is torch.ops.aten.equal.default:
            return True
        if function is torch.ops.aten.nonzero.default:
            (mask,) = args
            return mask.new_empty((round(mask.numel() * self._image_share), mask.dim()), dtype=torch.int64)
        result = COLLECTIVES.get(function, function)(*args, **kwargs)
        if function.overloadpacket is torch.ops.aten.any:
            setattr(result, _FOUND, True)
        return result


def _healthy_number(tensor: torch.Tensor) -> bool | int | float:
    """What a tensor of one number says in a step where nothing is wrong."""
    if tensor.dtype == torch.bool:
        return not getattr(tensor, _FOUND, False)
    return 1.0 if tensor.is_floating_point() else 0
