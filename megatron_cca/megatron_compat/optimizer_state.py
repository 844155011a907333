"""Corrections of how Megatron-Core 0.19.2's optimizers save, load and release their state.

- Saving: Megatron-Core joins the buckets of a buffer without the padding between them
  (``get_parameter_state_dp_zero``). Then it reads each parameter's part at its place with the padding
  (``sharded_param_state_fully_reshardable``). From the second bucket on, it reads parts of other parameters, without an
  error.
- Loading: Megatron-Core takes the optimizer's settings from the checkpoint. They must come from the configuration.
- Releasing: parameters and their hooks keep each other in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import accumulate

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.utils import get_model_config

# Tell parameter groups apart whatever their settings; Megatron-Core compares the settings, too, and raises where the
# learning rate has changed.
_STRUCTURE = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr", "optimizer")
# The parameters of a group, and its number of updates.
_STATE = ("params", "step")


@contextmanager
def padding_between_buckets(optimizer) -> Iterator[None]:
    """Let the optimizer keep the padding when it joins buckets within the block, so that it reads the right parts.

    Args:
        optimizer: Megatron's optimizer, chained or not. One without buckets is not changed.
    """
    with ExitStack() as stack:
        for one in getattr(optimizer, "chained_optimizers", [optimizer]):
            if isinstance(one, DistributedOptimizer):
                stack.enter_context(_spreading(one))
        yield


def keep_present_settings(state: dict, param_groups: list[dict]) -> None:
    """Write the optimizer's current settings into a state before it loads this state.

    Otherwise Megatron-Core and torch take betas, epsilon and the bounds of the learning rate from the saved parameter
    groups and ignore the configuration.

    Args:
        state: saved state of one or several of Megatron's optimizers. Changed in place.
        param_groups: parameter groups of the optimizer before it loads.
    """
    present = {_structure(group): group for group in param_groups}
    for saved in _saved_groups(state):
        # Megatron refuses a group that this run does not have.
        settings = present.get(_structure(saved), {})
        saved.update({name: value for name, value in settings.items() if name not in _STATE})


def leave_out_classes(state: dict) -> None:
    """Remove the classes that an offloaded optimizer keeps in its groups. Only plain data can be loaded again.

    Args:
        state: saved state of one or several of Megatron's optimizers. Changed in place.
    """
    for group in _saved_groups(state):
        for name in [name for name, value in group.items() if isinstance(value, type)]:
            del group[name]


def let_parts_count(optimizer) -> None:
    """Let the parts of an offloaded optimizer continue their own count of steps after a load.

    Before each step, Megatron-Core 0.19.2 copies the groups of the whole optimizer to its parts. A loaded count of
    steps would reset the part on the GPU each time, and its bias correction would not advance.

    Args:
        optimizer: Megatron's optimizer, chained or not. One that is not offloaded is not changed.
    """
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(whole := getattr(one, "optimizer", None), HybridDeviceOptimizer):
            for group in whole.param_groups:
                group.pop("step", None)


def release(policy: Iterable[DistributedDataParallel]) -> None:
    """Break the reference cycle that keeps a policy and its optimizer in memory. The policy cannot be trained then.

    In fp32, an optimizer's shard of a parameter is a view with a gradient. Through Megatron-Core's hooks in autograd's
    C++ code, the parameter then refers to itself. Garbage collection does not find this cycle. A second run in this
    process would have the weights, gradients and optimizer state of the first one still in memory.
    """
    for chunk in policy:
        get_model_config(chunk).grad_scale_func = None
        for parameter in chunk.parameters():
            parameter.main_param = None


@contextmanager
def _spreading(optimizer: DistributedOptimizer) -> Iterator[None]:
    join = optimizer.get_parameter_state_dp_zero
    optimizer.get_parameter_state_dp_zero = lambda *args, **options: _spread(optimizer, join(*args, **options))
    try:
        yield
    finally:
        del optimizer.get_parameter_state_dp_zero


def _spread(optimizer: DistributedOptimizer, state: dict | None) -> dict | None:
    for index, buffer in enumerate(optimizer.buffers if state is not None else ()):
        sizes = [bucket.numel_unpadded for bucket in buffer.buckets]
        starts, joined = [bucket.offset for bucket in buffer.buckets], [0, *accumulate(sizes)][:-1]
        if starts == joined:
            continue
        for tensors in state[index].values():
            for key, whole in tensors.items():
                if not torch.is_tensor(whole):
                    continue
                tensors[key] = spread = whole.new_zeros(buffer.numel)
                for size, start, place in zip(sizes, starts, joined, strict=True):
                    spread[start : start + size] = whole[place : place + size]
    return state


def _structure(group: dict) -> tuple:
    return tuple(group.get(name) for name in _STRUCTURE)


def _saved_groups(state: dict) -> Iterator[dict]:
    for name, value in state.items():
        if name == "param_groups":
            yield from value
        elif isinstance(value, dict) and name != "state":
            yield from _saved_groups(value)
