"""Matrix products that only GPUs have, on a CPU: half-precision factors and an fp32 result, in torch's own operations.

A test then takes the way of a GPU through the code, by the very calls, and can count what they allocate.
"""

from contextlib import contextmanager

import torch


def _mm(left, right, out_dtype):
    return left.to(out_dtype) @ right.to(out_dtype)


def _addmm_out(total, left, right, out_dtype, *, beta=1, alpha=1, out):
    """As CUDA's: the sum in the result's dtype, and factors in half precision."""
    if total.dtype != out_dtype or beta != 1 or alpha != 1:
        raise RuntimeError("only an fp32 sum to which the product is added")
    return out.copy_(total + left.to(out_dtype) @ right.to(out_dtype))


@contextmanager
def half_precision_products(*, adds_to_fp32=True):
    """Register them for CPU tensors; ``adds_to_fp32=False`` leaves out what torch has since 2.10."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("mm.dtype", _mm, "CPU")
    if adds_to_fp32:
        library.impl("addmm.dtype_out", _addmm_out, "CPU")
    try:
        yield
    finally:
        library._destroy()
