"""The few operations whose behaviour depends on the device.

Models and kernels ask :func:`current_operations`. A training job always gets :class:`DeviceOperations`. The planner
counts memory and messages without numbers. It brings a subclass that makes tensors of the same shapes
(``lab/planner``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

from megatron_cca.platform import accumulation, transfers


class DeviceOperations:
    """The operations on the device of their tensors."""

    def is_on_gpu(self, tensor: Tensor) -> bool:
        """Return whether tiles of logits and factors of products are on a GPU."""
        return tensor.is_cuda

    def host_copy(self, tensor: Tensor) -> Tensor:
        """Return a copy in host memory, which the GPU can fetch while it computes.

        Raises:
            RuntimeError: the driver cannot lock so much memory.
        """
        return transfers.host_copy(tensor)

    def add_product(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        """Compute ``total += left @ right``, see :func:`accumulation.add_product`."""
        accumulation.add_product(total, left, right)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return ``x`` ``[..., H]``, normalised over its last dimension, times ``weight`` ``[H]``."""
        return functional.rms_norm(x, (x.size(-1),), weight, eps)

    def causal_mask(self, queries: int, keys: int) -> Tensor | None:
        """Return the causal mask for scaled dot-product attention. Queries are the last of the ``keys`` positions."""
        return causal_lower_right(queries, keys)


_current = DeviceOperations()


def current_operations() -> DeviceOperations:
    """Return the current operations. All threads of the process share them."""
    return _current


@contextmanager
def operating_by(operations: DeviceOperations) -> Iterator[None]:
    """Use other operations within the block."""
    global _current
    before, _current = _current, operations
    try:
        yield
    finally:
        _current = before
