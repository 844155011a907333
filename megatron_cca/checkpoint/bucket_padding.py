"""Where the distributed optimizer's state lies if its buckets end in padding.

To save its state for any layout, Megatron-Core 0.19.2 joins the buckets of a buffer without the padding between them
(``get_parameter_state_dp_zero``), and then takes each parameter's part from where it lies with the padding
(``sharded_param_state_fully_reshardable``). From the second bucket on the parts are others', without a word.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import accumulate

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


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
