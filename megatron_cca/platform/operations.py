"""The few operations that depend on the device in more than their speed, in one place.

Models and kernels ask :func:`current_operations`. A training job always gets :class:`DeviceOperations`. Who computes
without numbers, to count memory and messages, brings a subclass that makes the same tensors (``lab/planner``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

from megatron_cca.platform import accumulation, transfers


class DeviceOperations:
    """Do each operation on the device that its tensors are on."""

    def is_on_gpu(self, tensor: Tensor) -> bool:
        """Return whether tiles of logits and factors of products are a GPU's."""
        return tensor.is_cuda

    def host_copy(self, tensor: Tensor) -> Tensor:
        """Return a copy in host memory, which the GPU can fetch while it computes.

        Raises:
            RuntimeError: the driver will not lock so much memory.
        """
        return transfers.host_copy(tensor)

    def add_product(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        """Do ``total += left @ right``; see :func:`accumulation.add_product`."""
        accumulation.add_product(total, left, right)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return ``x``, ``[..., H]``, normalised over its last dimension, times ``weight``, ``[H]``."""
        return functional.rms_norm(x, (x.size(-1),), weight, eps)

    def causal_mask(self, queries: int, keys: int) -> Tensor | None:
        """Return the mask of ``queries`` positions that are the last of ``keys``, for scaled dot-product attention."""
        return causal_lower_right(queries, keys)


_current = DeviceOperations()


def current_operations() -> DeviceOperations:
    """Return the operations in force, for all threads of this process."""
    return _current


@contextmanager
def operating_by(operations: DeviceOperations) -> Iterator[None]:
    """Put other operations in force inside."""
    global _current
    before, _current = _current, operations
    try:
        yield
    finally:
        _current = before
