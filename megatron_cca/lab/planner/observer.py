"""An exact count of what a step holds and sends: bytes of live tensors by phase, and all collectives.

On a CPU the count replaces what a GPU's allocator reports. The resident set of a process would not do. It also holds
libraries, freed pages and threads. These are gigabytes, much more than the peaks of small models. The module needs
neither Megatron-Core nor a platform.
"""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Names of c10d's operators in torch.distributed.
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


class LiveBytes(TorchDispatchMode):
    """A counter of the storages that operations create inside the context, as long as they live.

    Attributes:
        now: bytes alive now.
        peak: the most bytes alive since the last :meth:`reset_peak`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def reset_peak(self) -> None:
        """Reset the peak to the bytes alive now."""
        self.peak = self.now

    def discount(self, tensor: torch.Tensor) -> torch.Tensor:
        """Take a tensor out of the count, as one in host memory, and return it."""
        storage = tensor.untyped_storage()
        if self._known.pop(storage._cdata, None) is not None:
            self.now -= storage.nbytes()
        return tensor

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Run the operation, then count the tensors that it returned."""
        result = self.perform(function, args, kwargs or {})
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return result

    def perform(self, function, args: tuple, kwargs: dict):
        """Run an operation; subclasses may return another result."""
        return function(*args, **kwargs)

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or not size:
            return

        def forget(_reference: weakref.ref) -> None:
            if self._known.pop(key, None) is not None:
                self.now -= size

        self._known[key] = weakref.ref(storage, forget)
        self.now += size
        self.peak = max(self.peak, self.now)


@dataclass(frozen=True)
class Traffic:
    """The collectives of one kind on one group in one phase of a step.

    Attributes:
        group: Megatron's name of the group, such as ``tensor``.
        operation: the kind of the collective, such as ``all_reduce`` or ``send``.
        phase: the phase of the step that called it.
        group_size: number of ranks in the group.
        calls: number of calls.
        num_bytes: bytes of the larger side, summed over the calls; for an all_gather or reduce_scatter this is the
            whole tensor.
    """

    group: str
    operation: str
    phase: str
    group_size: int
    calls: int
    num_bytes: int


class TrafficCounter:
    """A counter of the collectives among c10d's operators."""

    def __init__(self) -> None:
        self._calls: Counter[tuple[str, str, str, int]] = Counter()
        self._bytes: Counter[tuple[str, str, str, int]] = Counter()
        self._groups: dict[str, str] = {}

    def name_groups(self, groups: dict[str, dist.ProcessGroup]) -> None:
        """Set the names of groups; a group keeps the first name that it gets."""
        for name, group in groups.items():
            self._groups.setdefault(group.group_name, name)

    def clear(self) -> None:
        """Reset the counts."""
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
        """Return the counted collectives, the most bytes first."""
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


class Observer(LiveBytes):
    """A counter of the tensors and collectives of a step, for real tensors and for fake ones.

    Attributes:
        phase: the current phase of the step, which the caller sets.
        peaks: the most bytes alive in each phase.
        traffic: the collectives so far.
        has_numbers: whether the tensors have values, not only shapes.
    """

    has_numbers = True

    def __init__(self) -> None:
        super().__init__()
        self.phase = "setting up"
        self.peaks: dict[str, int] = {}
        self.traffic = TrafficCounter()

    def start_over(self) -> None:
        """Reset the peaks and the collectives."""
        self.peaks.clear()
        self.traffic.clear()
        self.reset_peak()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Run the operation and count what it created and sent."""
        self.traffic.see(function, args, self.phase)
        result = super().__torch_dispatch__(function, types, args, kwargs)
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self.now)
        return result
