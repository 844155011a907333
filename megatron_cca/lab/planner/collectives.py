"""What a rank says to others: every collective, counted with its bytes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves

# c10d's operators, by the name that users of torch.distributed know.
_NAMES = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "broadcast_": "broadcast",
    "send": "send",
    "recv_": "recv",
    "alltoall_base_": "all_to_all",
    "alltoall_": "all_to_all",
    "barrier": "barrier",
}


@dataclass(frozen=True)
class Traffic:
    """All collectives of one kind on one group within a step.

    Attributes:
        group: Megatron's name of the group, such as ``tensor``.
        operation: such as ``all_reduce``, ``send``.
        phase: the part of the step that asked for it.
        group_size: its ranks.
        calls: how many.
        num_bytes: of the larger side, the whole tensor of an all_gather or reduce_scatter, summed over the calls.
    """

    group: str
    operation: str
    phase: str
    group_size: int
    calls: int
    num_bytes: int


class TrafficCounter:
    """Adds up collectives as operators of c10d go by."""

    def __init__(self) -> None:
        self._calls: Counter[tuple[str, str, str, int]] = Counter()
        self._bytes: Counter[tuple[str, str, str, int]] = Counter()
        self._groups: dict[str, str] = {}

    def name_groups(self, groups: dict[str, dist.ProcessGroup]) -> None:
        """Say what groups are called; the first name given to a group stays."""
        for name, group in groups.items():
            self._groups.setdefault(group.group_name, name)

    def clear(self) -> None:
        """Forget what was seen."""
        self._calls.clear()
        self._bytes.clear()

    def see(self, function, args: tuple, phase: str) -> None:
        """Count an operator if it is a collective."""
        namespace, _, operator = function._schema.name.partition("::")
        if namespace != "c10d" or operator not in _NAMES:
            return
        group = _group_of(args)
        name = self._groups.get(group.group_name, "job") if group is not None else "job"
        size = group.size() if group is not None else 0
        key = (name, _NAMES[operator], phase, size)
        self._calls[key] += 1
        self._bytes[key] += max((_bytes(arg) for arg in args), default=0)

    def traffic(self) -> list[Traffic]:
        """What was seen; the most bytes first."""
        found = [Traffic(*key, calls, self._bytes[key]) for key, calls in self._calls.items()]
        return sorted(found, key=lambda one: (-one.num_bytes, one.group, one.operation))


def _group_of(args: tuple) -> dist.ProcessGroup | None:
    for arg in args:
        if isinstance(arg, torch.ScriptObject):
            try:
                return dist.ProcessGroup.unbox(arg)
            except RuntimeError:
                continue  # another boxed object, such as the kind of reduction
    return None


def _bytes(arg) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(arg) if isinstance(leaf, torch.Tensor))
