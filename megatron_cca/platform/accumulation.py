"""Weight gradients that go straight into a sum: how a product is added in place, and what autograd gets instead.

The one place that decides how half-precision factors are summed in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

Way = Callable[[Tensor, Tensor, Tensor], None]
_ATEN = torch.ops.aten
_COPIES = (_ATEN.detach.default, _ATEN.alias.default, _ATEN.clone.default)
_SUMS = (_ATEN.add.Tensor, _ATEN.add_.Tensor)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Do ``total += left @ right`` in ``total``'s dtype.

    Args:
        total: ``[M, N]``, contiguous, fp32 or fp64; updated in place.
        left: ``[M, K]``, of ``total``'s dtype, or on a GPU fp16 or bf16; contiguous, or the transpose of such a tensor.
        right: ``[K, N]``, contiguous, of ``left``'s dtype.
    """
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        way_to_add(total.device, left.dtype)(total, left, right)


@cache
def way_to_add(device: torch.device, dtype: torch.dtype) -> Way:
    """Choose how products of ``dtype`` are added to an fp32 sum, by a small product on the device itself.

    The two ways in place come first: without one, a product is written, read again and added, in memory of its own.
    Versions do not tell: torch has the argument since 2.8 and takes an fp32 sum there since 2.10.
    """
    return next((way for way in (_by_torch, _by_transformer_engine) if _is_right(way, device, dtype)), _product_and_sum)


def _by_torch(total: Tensor, left: Tensor, right: Tensor) -> None:
    torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


def _by_transformer_engine(total: Tensor, left: Tensor, right: Tensor) -> None:
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    # Its kernels see memory, not strides; its operands come in the order of column-major libraries.
    factor, layout = (left, "NN") if left.is_contiguous() else (left.t(), "NT")
    general_gemm(right, factor, out_dtype=total.dtype, layout=layout, out=total, accumulate=True)


def _product_and_sum(total: Tensor, left: Tensor, right: Tensor) -> None:
    total.add_(torch.mm(left, right, out_dtype=total.dtype))


def _is_right(way: Way, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a way is there and sums exactly what only fp32 can hold."""
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
        # What is missing may say so in any way: an import, an argument, a type, a kernel.
        return False
    return True


class MainGradPlaceholder(Tensor):
    """Zeros of a weight's shape, strides, dtype and device that hold no memory.

    Megatron's data parallelism wants a gradient on the weight's device, so that its hooks run on that device's thread,
    and then forgets it: an Emu3 head's would be 1.5 GB. An expanded number would not do, since autograd copies a
    gradient that is not laid out like its weight. Added to another tensor a placeholder leaves it as it is, which is
    right where a weight has another use in the graph, and where Megatron adds the gradient nevertheless
    (``zero_out_wgrad``).
    """

    @staticmethod
    def __new__(cls, weight: Tensor) -> MainGradPlaceholder:
        """Return the placeholder of ``weight``'s gradient."""
        layout = {"strides": weight.stride(), "dtype": weight.dtype, "device": weight.device}
        return Tensor._make_wrapper_subclass(cls, weight.shape, **layout, storage_size=0)

    def __repr__(self) -> str:
        return f"MainGradPlaceholder(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        """Be copied and be added as zeros are; refuse all else, since there are no numbers to read.

        Raises:
            RuntimeError: an operation that would need numbers.
        """
        if function in _COPIES:
            return cls(args[0])
        if function in _SUMS and isinstance(args[1], cls):
            return args[0]
        if function is _ATEN.add.Tensor:
            return args[1]
        raise RuntimeError(f"{function}: weight.grad is a placeholder; the gradient is in weight.main_grad")
