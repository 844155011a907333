"""One rank of a job of any size in one process: fake process groups, tensors that have shapes but no memory.

Everything is Megatron's and this project's own code; what needs numbers to go on (is it finite? how many image tokens?)
gets the answers of a healthy step.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import clip_grads
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_cca.models import local_layers, lora, streaming
from megatron_cca.planner.collectives import TrafficCounter
from megatron_cca.planner.live_bytes import LiveBytes
from megatron_cca.training import setup

MAX_WORLD_SIZE = 16_384

# Not as an attribute of its package, where the function of the same name hides it.
_LOGPS = importlib.import_module("megatron_cca.parallel.sequence_logps")
_CHECK_SHARDS = _LOGPS._HeadShard._check_shards
# Marks the answer of torch.any: in a healthy step there is none.
_FOUND = "_answers_whether_there_is_any"


@contextmanager
def fake_job(rank: int, world_size: int) -> Iterator[None]:
    """This process as one rank of a job whose other ranks do not exist; afterwards there is no job.

    Args:
        rank: 0 to ``world_size - 1``.
        world_size: up to :data:`MAX_WORLD_SIZE`.
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
        like_gpu: whether the LM head takes the tiles that a GPU takes, in its precision, or a CPU's.
    """
    observer = _HealthyStep(image_share)
    with ExitStack() as stack:
        for patched in _patches(observer, like_gpu):
            stack.enter_context(patched)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(observer)
        yield observer


class Observer(LiveBytes):
    """Live bytes by phase of a step, and its collectives; of real tensors as of fake ones.

    Attributes:
        phase: what the step is doing; the caller says.
        peaks: the most bytes alive in each phase.
        traffic: the collectives so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = "setting up"
        self.peaks: dict[str, int] = {}
        self.traffic = TrafficCounter()

    def start_over(self) -> None:
        """Count peaks and collectives from now on."""
        self.peaks.clear()
        self.traffic.clear()
        self.reset_peak()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Run the operation and count what it made and sent."""
        self.traffic.see(function, args, self.phase)
        result = super().__torch_dispatch__(function, types, args, kwargs)
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self.now)
        return result


class _HealthyStep(Observer):
    """Also answers what needs numbers, as in a step where nothing is wrong."""

    def __init__(self, image_share: float) -> None:
        super().__init__()
        self._image_share = image_share

    def perform(self, function, args: tuple, kwargs: dict):
        """Answer, or run the operation."""
        if function is torch.ops.aten._local_scalar_dense.default:
            return _healthy_number(args[0])
        if function is torch.ops.aten.nonzero.default:
            (mask,) = args
            return mask.new_empty((round(mask.numel() * self._image_share), mask.dim()), dtype=torch.int64)
        result = _ONE_BY_ONE.get(function, function)(*args, **kwargs)
        if function.overloadpacket is torch.ops.aten.any:
            setattr(result, _FOUND, True)
        return result


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


_ONE_BY_ONE = {
    torch.ops.c10d.allgather_into_tensor_coalesced_.default: _gathered_one_by_one,
    torch.ops.c10d.reduce_scatter_tensor_coalesced_.default: _scattered_one_by_one,
    torch.ops.c10d.allreduce_coalesced_.default: _reduced_together,
}


def _healthy_number(tensor: torch.Tensor) -> bool | int | float:
    """What a tensor of one number says in a step where nothing is wrong."""
    if tensor.dtype == torch.bool:
        return not getattr(tensor, _FOUND, False)
    return 1.0 if tensor.is_floating_point() else 0


def _patches(observer: Observer, like_gpu: bool) -> list:
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
        # Megatron's substitute for a fused kernel makes one tensor of a list of tensors, number by number.
        patch.object(clip_grads, "l2_norm_impl", _l2_norm),
        patch.object(shard, "_check_shards", _check_own_shard),
        patch.object(setup, "initialize_by_name", _nothing),
    ]
    patches.append(patch.object(local_layers, "causal_lower_right", _no_mask if like_gpu else _written_out_mask))
    if like_gpu:
        widths = _LOGPS._TILE_WIDTH
        patches += [
            patch.dict(widths, cpu=widths["cuda"]),
            patch.object(shard, "operand", lambda self, tensor: tensor),
            # A CPU has no such kernel and keeps fp32 copies of all that it normalises.
            patch.object(local_layers, "rms_norm", lambda x, _shape, weight, _eps: _FusedNorm.apply(x, weight)),
            # Megatron compiles its fused functions; what they keep for backward is the same uncompiled.
            torch.compiler.set_stance("force_eager"),
        ]
    return patches


def _written_out_mask(queries: int, keys: int) -> torch.Tensor:
    """What torch makes of its mask subclass where no kernel takes it; fake tensors cannot be of two subclasses."""
    return torch.ones(queries, keys, dtype=torch.bool).tril(diagonal=keys - queries)


def _no_mask(queries: int, keys: int) -> None:
    """A GPU's kernel needs none in memory; shapes and what is kept for backward are the same without."""


def _l2_norm(_chunk_size, _noop_flag, tensor_lists: list[list[torch.Tensor]], *_per_tensor) -> tuple:
    norms = [torch.linalg.vector_norm(tensor) for tensor in tensor_lists[0]]
    return torch.linalg.vector_norm(torch.stack(norms)), None


def _nothing(*_unused, **_unused_too) -> None:
    pass


def _all_gather_object(everyone: list, own, group=None) -> None:
    everyone[:] = [own] * len(everyone)


def _check_own_shard(self, largest: int, smallest: int) -> None:
    rows = self.weight.size(0)
    _CHECK_SHARDS(self, rows, rows)
