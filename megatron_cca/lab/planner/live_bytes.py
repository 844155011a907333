"""Bytes of live tensors on a CPU, counted exactly: what a GPU's allocator would say of them.

A process's resident set also holds libraries, freed pages and threads, gigabytes of them; a ratio of small models'
peaks would drown in it.
"""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations made inside of the context, for as long as they live.

    Attributes:
        now: bytes alive.
        peak: the most since the last :meth:`reset_peak`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def reset_peak(self) -> None:
        """Let the peak count from now on."""
        self.peak = self.now

    def discount(self, tensor: torch.Tensor) -> torch.Tensor:
        """Take a tensor for one in host memory, which does not count."""
        storage = tensor.untyped_storage()
        if self._known.pop(storage._cdata, None) is not None:
            self.now -= storage.nbytes()
        return tensor

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Run the operation, then look at what it returned."""
        result = self.perform(function, args, kwargs or {})
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return result

    def perform(self, function, args: tuple, kwargs: dict):
        """Run an operation; for those who have another answer to some."""
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
