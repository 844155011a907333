"""A gradient without numbers, for a weight whose gradient is in its ``main_grad`` already."""

from __future__ import annotations

import torch
from torch import Tensor

_ATEN = torch.ops.aten
_COPIES = (_ATEN.detach.default, _ATEN.alias.default, _ATEN.clone.default)
_SUMS = (_ATEN.add.Tensor, _ATEN.add_.Tensor)


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
