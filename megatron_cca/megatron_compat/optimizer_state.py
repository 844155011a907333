"""What Megatron-Core 0.19.2's optimizers do to their state that a run must not suffer: saving, loading, letting go.

- To save the distributed optimizer's state for any layout, Megatron-Core joins the buckets of a buffer without the
  padding between them (``get_parameter_state_dp_zero``). Then it takes each parameter's part from where it lies with
  the padding (``sharded_param_state_fully_reshardable``). From the second bucket on the parts are those of others, and
  nothing is said.
- A checkpoint brings an optimizer's state along, and Megatron-Core also takes the settings from it. Those are the
  configuration's.
- Parameters and their hooks keep each other in memory.
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
# Which parameters a group has, and how many updates it has seen.
_STATE = ("params", "step")


@contextmanager
def padding_between_buckets(optimizer) -> Iterator[None]:
    """Inside, what the optimizer joins has the padding that its places count with.

    Args:
        optimizer: Megatron's, chained or not; without buckets nothing happens.
    """
    with ExitStack() as stack:
        for one in getattr(optimizer, "chained_optimizers", [optimizer]):
            if isinstance(one, DistributedOptimizer):
                stack.enter_context(_spreading(one))
        yield


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


def keep_present_settings(state: dict, param_groups: list[dict]) -> None:
    """Write the settings that an optimizer has into the state that it is to load.

    Megatron-Core and torch take betas, epsilon and the bounds of the learning rate from the parameter groups that were
    saved, whatever a run that continues asks for.

    Args:
        state: as Megatron's optimizers save it, also several of them; changed in place.
        param_groups: of the optimizer before it loads.
    """
    present = {_structure(group): group for group in param_groups}
    for saved in _saved_groups(state):
        # One that this run has not is Megatron's to refuse.
        settings = present.get(_structure(saved), {})
        saved.update({name: value for name, value in settings.items() if name not in _STATE})


def leave_out_classes(state: dict) -> None:
    """Take the classes that an offloaded optimizer names out of its groups; only plain data is read back.

    Args:
        state: as Megatron's optimizers save it, also several of them; changed in place.
    """
    for group in _saved_groups(state):
        for name in [name for name, value in group.items() if isinstance(value, type)]:
            del group[name]


def let_parts_count(optimizer) -> None:
    """Let the parts of an offloaded optimizer count on after a load.

    Before each step Megatron-Core 0.19.2 writes the whole's groups over those of the parts. A count of steps among them
    would set back the part on the GPU, and its bias correction would stand still.

    Args:
        optimizer: Megatron's, chained or not; any other kind stays as it is.
    """
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(whole := getattr(one, "optimizer", None), HybridDeviceOptimizer):
            for group in whole.param_groups:
                group.pop("step", None)


def _structure(group: dict) -> tuple:
    return tuple(group.get(name) for name in _STRUCTURE)


def _saved_groups(state: dict) -> Iterator[dict]:
    for name, value in state.items():
        if name == "param_groups":
            yield from value
        elif isinstance(value, dict) and name != "state":
            yield from _saved_groups(value)


def release(policy: Iterable[DistributedDataParallel]) -> None:
    """Undo what would keep a policy and its optimizer in memory once nothing else does.

    In fp32 an optimizer's shard of a parameter is a view with a gradient. Through Megatron-Core's hooks, in autograd's
    C++, the parameter then keeps itself, and no garbage collection finds that circle: a second run in this process
    would find weights, gradients and optimizer state of the first in memory. The policy cannot be trained afterwards.
    """
    for chunk in policy:
        get_model_config(chunk).grad_scale_func = None
        for parameter in chunk.parameters():
            parameter.main_param = None
