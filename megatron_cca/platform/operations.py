"""The few operations whose behaviour depends on the device, and weight gradients that are added directly to a sum.

Models and kernels ask :func:`current_operations`. A training job always gets :class:`DeviceOperations`. The planner
counts memory and messages without numbers. It brings a subclass that makes tensors of the same shapes
(``lab/planner``). Only this module decides how products of half precision are summed in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

Way = Callable[[Tensor, Tensor, Tensor], None]
_ATEN = torch.ops.aten
_COPIES = (_ATEN.detach.default, _ATEN.alias.default, _ATEN.clone.default)
_SUMS = (_ATEN.add.Tensor, _ATEN.add_.Tensor)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Compute ``total += left @ right`` in ``total``'s dtype.

    Args:
        total: ``[M, N]``, contiguous, fp32 or fp64, updated in place.
        left: ``[M, K]``, in ``total``'s dtype, or on a GPU in fp16 or bf16. Contiguous, or the transpose of a
            contiguous tensor.
        right: ``[K, N]``, contiguous, in ``left``'s dtype.
    """
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        way_to_add(total.device, left.dtype)(total, left, right)


@cache
def way_to_add(device: torch.device, dtype: torch.dtype) -> Way:
    """Choose how products of ``dtype`` are added to an fp32 sum, by a test with a small product on the device.

    The two ways that work in place come first. The third one needs more memory: it writes the product, then reads and
    adds it. The version of torch does not tell: the argument exists since 2.8, but accepts an fp32 sum since 2.10.
    """
    return next((way for way in (_by_torch, _by_transformer_engine) if _is_right(way, device, dtype)), _product_and_sum)


def _by_torch(total: Tensor, left: Tensor, right: Tensor) -> None:
    torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


def _by_transformer_engine(total: Tensor, left: Tensor, right: Tensor) -> None:
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    # Its kernels ignore strides. Its operands have the order of column-major libraries.
    factor, layout = (left, "NN") if left.is_contiguous() else (left.t(), "NT")
    general_gemm(right, factor, out_dtype=total.dtype, layout=layout, out=total, accumulate=True)


def _product_and_sum(total: Tensor, left: Tensor, right: Tensor) -> None:
    total.add_(torch.mm(left, right, out_dtype=total.dtype))


def _is_right(way: Way, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether a way exists and gives the exact result of a sum that needs fp32."""
    size = 16
    whole = torch.arange(size * size, device=device).view(size, size)
    left, right = ((whole * step % 7 - 3).to(dtype) for step in (1, 3))
    start = whole.float() + 2.0**-12
    try:
        for factor in (left, left.t()):
            total = start.clone()
            way(total, factor, right)
            if not torch.equal(total, start + factor.float() @ right.float()):
                return False
    except Exception:
        # If something is missing (a module, an argument, a dtype, a kernel), the type of the error is unknown.
        return False
    return True


class MainGradPlaceholder(Tensor):
    """Zeros with a weight's shape, strides, dtype and device that use no memory.

    Megatron's data parallelism needs a gradient on the weight's device, so that its hooks run on that device's thread.
    It then drops the gradient, which is 1.5 GB for an Emu3 head. An expanded scalar does not work: autograd copies a
    gradient with another memory layout than its weight.

    Adding a placeholder to a tensor does not change the tensor. This is right if the weight has another use in the
    graph, and if Megatron adds the gradient nevertheless (``zero_out_wgrad``).
    """

    @staticmethod
    def __new__(cls, weight: Tensor) -> MainGradPlaceholder:
        """Return the placeholder for the gradient of ``weight``."""
        layout = {"strides": weight.stride(), "dtype": weight.dtype, "device": weight.device}
        return Tensor._make_wrapper_subclass(cls, weight.shape, **layout, storage_size=0)

    def __repr__(self) -> str:
        return f"MainGradPlaceholder(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        """Allow copies and sums, as for zeros. Refuse everything else, because there are no numbers to read.

        Raises:
            RuntimeError: the operation needs numbers.
        """
        if function in _COPIES:
            return cls(args[0])
        if function in _SUMS and isinstance(args[1], cls):
            return args[0]
        if function is _ATEN.add.Tensor:
            return args[1]
        raise RuntimeError(f"{function}: weight.grad is a placeholder; the gradient is in weight.main_grad")


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
        from megatron_cca.platform.host_weights import host_copy

        return host_copy(tensor)

    def add_product(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        """Compute ``total += left @ right``, see :func:`add_product`."""
        add_product(total, left, right)

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
