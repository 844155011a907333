"""One rank of a job of any size in one process: fake process groups, tensors that have shapes but no memory.

Everything is Megatron's and this project's own code. What needs numbers to go on (is it finite? how many image tokens?)
gets the answers of a healthy step. What only real tensors or a GPU can do has a substitute with the same shapes and
lifetimes. This project's own operations are replaced through ``platform/operations.py``. Torch 2.15 has no such place:
:func:`patches` names each function of its that is replaced, and why. ``megatron_compat`` replaces Megatron-Core's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_cca.lab.planner.observer import LiveBytes, Observer
from megatron_cca.megatron_compat.fake_tensors import replaced_fusions, replaced_norm
from megatron_cca.platform.operations import DeviceOperations, operating_by


class LikeCpu(DeviceOperations):
    """The tensors that a CPU makes.

    Args:
        counted: does not count what is in host memory.
    """

    def __init__(self, counted: LiveBytes) -> None:
        self._counted = counted

    def host_copy(self, tensor: Tensor) -> Tensor:
        """Return a copy that is not counted."""
        return self._counted.discount(tensor.clone())

    def causal_mask(self, queries: int, keys: int) -> Tensor | None:
        """Return what torch makes of its mask subclass where no kernel takes it; fake tensors cannot be of both."""
        return torch.ones(queries, keys, dtype=torch.bool).tril(diagonal=keys - queries)


class LikeGpu(LikeCpu):
    """The tensors that a GPU makes; their numbers are nobody's."""

    def is_on_gpu(self, _tensor: Tensor) -> bool:
        """Return True: tiles and precision are a GPU's."""
        return True

    def add_product(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        """Make nothing: a GPU adds a half-precision product to a sum in place."""
        if left.dtype == total.dtype:
            super().add_product(total, left, right)

    def rms_norm(self, x: Tensor, weight: Tensor, _eps: float) -> Tensor:
        """Keep what a fused kernel keeps: a CPU has none and keeps fp32 copies of all that it normalises."""
        return _FusedNorm.apply(x, weight)

    def causal_mask(self, _queries: int, _keys: int) -> Tensor | None:
        """Return None: a kernel needs no mask in memory; shapes and what backward keeps are the same without."""
        return None


class _FusedNorm(torch.autograd.Function):
    """The tensors of a fused RMSNorm, without its numbers: it keeps its input and a number for each row."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, gradient):
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def patches(*, like_gpu: bool) -> list[AbstractContextManager]:
    """Return contexts, to be entered around fake tensors, that replace functions of torch and Megatron-Core.

    Args:
        like_gpu: whether kernels that a CPU has not are to be counted as they are on a GPU.
    """
    found = [
        # They send pickled objects, which takes real bytes. Every rank says what this one says.
        patch.object(dist, "all_gather_object", _all_gather_object),
        patch.object(dist, "broadcast_object_list", _nothing),
        # The weights are made in their type; torch cannot swap fake parameters in place.
        patch.object(torch.nn.Module, "bfloat16", lambda module: module),
        replaced_norm(),
    ]
    if like_gpu:
        found += [*replaced_fusions(), torch.compiler.set_stance("force_eager")]
    return found


def _nothing(*_unused, **_unused_too) -> None:
    pass


def _all_gather_object(everyone: list, own, group=None) -> None:
    everyone[:] = [own] * len(everyone)


def _gathered_one_by_one(outputs: list, inputs: list, group: torch.ScriptObject, *_unused):
    """Fake tensors know only the plain all_gather."""
    pairs = zip(outputs, inputs, strict=True)
    return [torch.ops.c10d._allgather_base_(output, own, group)[1] for output, own in pairs][-1]


def _scattered_one_by_one(outputs: list, inputs: list, group: torch.ScriptObject, reduction, *_unused):
    """Likewise of reduce_scatter."""
    pairs = zip(outputs, inputs, strict=True)
    return [torch.ops.c10d._reduce_scatter_base_(output, own, group, reduction)[1] for output, own in pairs][-1]


def _reduced_together(tensors: list, group: torch.ScriptObject, reduction, *_unused):
    """Likewise of all_reduce."""
    return torch.ops.c10d.allreduce_(tensors, group, reduction, None)[1]


# Collectives that fake tensors do not know, by ones that they do.
COLLECTIVES = {
    torch.ops.c10d.allgather_into_tensor_coalesced_.default: _gathered_one_by_one,
    torch.ops.c10d.reduce_scatter_tensor_coalesced_.default: _scattered_one_by_one,
    torch.ops.c10d.allreduce_coalesced_.default: _reduced_together,
}


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
