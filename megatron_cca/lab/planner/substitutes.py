"""What stands in, on fake tensors, for what only real ones or a GPU can do; shapes and lifetimes are the originals'."""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager
from unittest.mock import patch

import torch
import torch.distributed as dist

from megatron_cca.lab.planner.live_bytes import LiveBytes
from megatron_cca.megatron_compat.fake_tensors import replaced_fusions, replaced_norm
from megatron_cca.models import local_layers, lora, streaming
from megatron_cca.parallel import accumulation
from megatron_cca.training import setup

# Not as an attribute of its package, where the function of the same name hides it.
_LOGPS = importlib.import_module("megatron_cca.parallel.sequence_logps")
_CHECK_SHARDS = _LOGPS._HeadShard._check_shards


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


# Collectives that fake tensors do not know, by ones that they do.
COLLECTIVES = {
    torch.ops.c10d.allgather_into_tensor_coalesced_.default: _gathered_one_by_one,
    torch.ops.c10d.reduce_scatter_tensor_coalesced_.default: _scattered_one_by_one,
    torch.ops.c10d.allreduce_coalesced_.default: _reduced_together,
}


def substitutes(observer: LiveBytes, *, like_gpu: bool) -> list[AbstractContextManager]:
    """Contexts to be entered around fake tensors.

    Args:
        observer: does not count what is in host memory.
        like_gpu: whether kernels that a CPU has not are to be counted as they are on a GPU.
    """
    shard = _LOGPS._HeadShard
    patches = [
        # Every rank says what this one says.
        patch.object(dist, "all_gather_object", _all_gather_object),
        patch.object(dist, "broadcast_object_list", _nothing),
        # The weights are made in their type; torch cannot swap fake parameters in place.
        patch.object(torch.nn.Module, "bfloat16", lambda module: module),
        # What is offloaded lies in host memory.
        patch.object(streaming, "host_copy", lambda tensor: observer.discount(tensor.clone())),
        patch.object(lora, "skip_init", lambda kind, *sizes, **options: kind(*sizes, **options)),
        patch.object(lora, "_draw", _nothing),
        replaced_norm(),
        patch.object(shard, "_check_shards", _check_own_shard),
        patch.object(setup, "initialize_by_name", _nothing),
    ]
    patches.append(patch.object(local_layers, "causal_lower_right", _no_mask if like_gpu else _written_out_mask))
    if like_gpu:
        patches += [
            patch.object(_LOGPS, "_on_gpu", lambda _tensor: True),
            # A GPU adds a half-precision product to a sum in place.
            patch.object(accumulation, "way_to_add", lambda *_device_and_dtype: _nothing),
            # A CPU has no such kernel and keeps fp32 copies of all that it normalises.
            patch.object(local_layers, "rms_norm", lambda x, _shape, weight, _eps: _FusedNorm.apply(x, weight)),
            *replaced_fusions(),
            torch.compiler.set_stance("force_eager"),
        ]
    return patches


def _written_out_mask(queries: int, keys: int) -> torch.Tensor:
    """What torch makes of its mask subclass where no kernel takes it; fake tensors cannot be of two subclasses."""
    return torch.ones(queries, keys, dtype=torch.bool).tril(diagonal=keys - queries)


def _no_mask(queries: int, keys: int) -> None:
    """A GPU's kernel needs none in memory; shapes and what is kept for backward are the same without."""


def _nothing(*_unused, **_unused_too) -> None:
    pass


def _all_gather_object(everyone: list, own, group=None) -> None:
    everyone[:] = [own] * len(everyone)


def _check_own_shard(self, largest: int, smallest: int) -> None:
    rows = self.weight.size(0)
    _CHECK_SHARDS(self, rows, rows)
