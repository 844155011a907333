"""What stands in, on fake tensors, for what only real ones or a GPU can do; shapes and lifetimes are the originals'.

This project's own operations are replaced through ``platform/operations.py``. Torch 2.15 and Megatron-Core 0.19 have
no such place: :func:`patches` names each function of theirs that is replaced, and why.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core.fusions import fused_bias_swiglu
from megatron.core.optimizer import clip_grads
from torch import Tensor

from megatron_cca.lab.planner.live_bytes import LiveBytes
from megatron_cca.platform.operations import DeviceOperations


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
        # Megatron's substitute for a fused kernel makes one tensor of a list of tensors, number by number.
        patch.object(clip_grads, "l2_norm_impl", _l2_norm),
    ]
    if like_gpu:
        found += [
            # Megatron compiles its fused functions; compiled, they make no more than what they return.
            patch.object(fused_bias_swiglu, "swiglu", lambda y: y.new_empty(*y.shape[:-1], y.size(-1) // 2)),
            patch.object(fused_bias_swiglu, "swiglu_back", lambda _gradient, y: torch.empty_like(y)),
            torch.compiler.set_stance("force_eager"),
        ]
    return found


def _l2_norm(_chunk_size, _noop_flag, tensor_lists: list[list[Tensor]], *_per_tensor) -> tuple:
    norms = [torch.linalg.vector_norm(tensor) for tensor in tensor_lists[0]]
    return torch.linalg.vector_norm(torch.stack(norms)), None


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
