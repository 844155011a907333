"""One rank of a job of any size in one process: fake process groups, and tensors with shapes but no memory.

All code is Megatron's and this project's own. Some operations need values (is a number finite? how many image tokens
are there?). They get the values of a healthy step. Some operations need real tensors or a GPU. They have a substitute
with the same shapes and lifetimes. This project's own operations are replaced through ``platform/operations.py``. Torch
2.15 has no such place. :func:`patches` names each function of torch that is replaced, and why. ``megatron_compat``
replaces functions of Megatron-Core.
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
    """The tensors that a CPU creates.

    Args:
        counted: the counter, which must not count host memory.
    """

    def __init__(self, counted: LiveBytes) -> None:
        self._counted = counted

    def host_copy(self, tensor: Tensor) -> Tensor:
        """Return a copy that does not count."""
        return self._counted.discount(tensor.clone())

    def causal_mask(self, queries: int, keys: int) -> Tensor | None:
        """Return the mask as a plain tensor, as torch builds it where no kernel takes its mask subclass.

        A fake tensor cannot be a mask subclass, too.
        """
        return torch.ones(queries, keys, dtype=torch.bool).tril(diagonal=keys - queries)


class LikeGpu(LikeCpu):
    """The tensors that a GPU creates; nothing reads their values."""

    def is_on_gpu(self, _tensor: Tensor) -> bool:
        """Return True, to get the tiles and the precision of a GPU."""
        return True

    def add_product(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        """Create no tensor for a half-precision product.

        A GPU adds it to the sum in place.
        """
        if left.dtype == total.dtype:
            super().add_product(total, left, right)

    def rms_norm(self, x: Tensor, weight: Tensor, _eps: float) -> Tensor:
        """Keep the tensors that a fused kernel keeps.

        A CPU has no fused kernel. It keeps fp32 copies of all inputs.
        """
        return _FusedNorm.apply(x, weight)

    def causal_mask(self, _queries: int, _keys: int) -> Tensor | None:
        """Return None, because a GPU's kernel needs no mask in memory.

        Shapes do not change without it, nor do the tensors that backward keeps.
        """
        return None


class _FusedNorm(torch.autograd.Function):
    """The tensors of a fused RMSNorm without its values.

    It keeps its input and a number for each row.
    """

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, gradient):
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def patches(*, like_gpu: bool) -> list[AbstractContextManager]:
    """Return contexts that replace functions of torch and Megatron-Core around fake tensors.

    Args:
        like_gpu: whether to count kernels that a CPU lacks as on a GPU.
    """
    found = [
        # They send pickled objects, which need real bytes. Each rank is taken to send what this rank sends.
        patch.object(dist, "all_gather_object", _all_gather_object),
        patch.object(dist, "broadcast_object_list", _nothing),
        # The weights are created in their dtype. Torch cannot swap fake parameters in place.
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
    """Replace a coalesced all_gather by plain ones, because fake tensors know no other."""
    pairs = zip(outputs, inputs, strict=True)
    return [torch.ops.c10d._allgather_base_(output, own, group)[1] for output, own in pairs][-1]


def _scattered_one_by_one(outputs: list, inputs: list, group: torch.ScriptObject, reduction, *_unused):
    """Replace a coalesced reduce_scatter by plain ones."""
    pairs = zip(outputs, inputs, strict=True)
    return [torch.ops.c10d._reduce_scatter_base_(output, own, group, reduction)[1] for output, own in pairs][-1]


def _reduced_together(tensors: list, group: torch.ScriptObject, reduction, *_unused):
    """Replace a coalesced all_reduce by a plain one."""
    return torch.ops.c10d.allreduce_(tensors, group, reduction, None)[1]


# Substitutes for the collectives that fake tensors do not support.
COLLECTIVES = {
    torch.ops.c10d.allgather_into_tensor_coalesced_.default: _gathered_one_by_one,
    torch.ops.c10d.reduce_scatter_tensor_coalesced_.default: _scattered_one_by_one,
    torch.ops.c10d.allreduce_coalesced_.default: _reduced_together,
}


# Marks the result of torch.any. In a healthy step it is False.
_FOUND = "_answers_whether_there_is_any"


@contextmanager
def fake_job(rank: int, world_size: int) -> Iterator[None]:
    """Run this process as one rank of a job whose other ranks do not exist.

    The job ends with the context.

    Args:
        rank: 0 to ``world_size - 1``.
        world_size: number of ranks of the job; each needs a little time for its groups.
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
    """Give tensors no memory inside the context.

    The yielded observer counts the bytes that they would hold, and the bytes that are sent.

    Args:
        image_share: image tokens as a share of all positions of a row.
        like_gpu: whether to count what a GPU creates; otherwise what a CPU creates.
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
    """An observer that also returns the values of a healthy step."""

    has_numbers = False

    def __init__(self, image_share: float) -> None:
        super().__init__()
        self._image_share = image_share

    def perform(self, function, args: tuple, kwargs: dict):
        """Return the value of a healthy step, or run the operation."""
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
    """Return the value of a tensor with one element in a healthy step."""
    constant = getattr(tensor, "constant", None)
    if constant is not None:
        # The code wrote the number down, such as the kind of a mask. Recomputation of the attention reads it back.
        return constant.item()
    if tensor.dtype == torch.bool:
        return not getattr(tensor, _FOUND, False)
    return 1.0 if tensor.is_floating_point() else 0
