"""Computes Adam and the sums over many tensors that Transformer Engine's ``FusedAdam`` and Megatron's clipping call."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

Lists = Sequence[Sequence[Tensor]]


class Settings(NamedTuple):
    """What the kernels are told besides tensors, in their order.

    Attributes:
        lr: learning rate.
        beta1: decay rate of the first moments.
        beta2: decay rate of the second moments.
        eps: added to the denominator.
        step: 1 on the first call.
        is_decoupled: AdamW's weight decay; nothing else is emulated.
        corrects_bias: of the moments; nothing else is emulated.
        weight_decay: of AdamW.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    step: int
    is_decoupled: int
    corrects_bias: int
    weight_decay: float

    def moved(self, weight: Tensor, gradient: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Return the new weight in float32; the moments move on, each stored in its own type."""
        assert self.is_decoupled and self.corrects_bias, "not emulated"
        gradient = gradient.float()
        mean = self.beta1 * first.float() + (1 - self.beta1) * gradient
        square = self.beta2 * second.float() + (1 - self.beta2) * gradient * gradient
        first.copy_(mean)
        second.copy_(square)
        root = (square / (1 - self.beta2**self.step)).sqrt() + self.eps
        update = (mean / (1 - self.beta1**self.step)) / root
        return weight - self.lr * (update + self.weight_decay * weight)


def adam(chunk_size: int, overflow: Tensor, lists: Lists, *settings: float) -> None:
    """Update parameters in place, each in its own type, with all arithmetic in float32.

    Args:
        chunk_size: of the kernel's launches; unused.
        overflow: unused.
        lists: gradients, parameters, first and second moments, and if wanted the master weights, which then count.
        settings: those of :class:`Settings`.
    """
    gradients, parameters, firsts, seconds, *masters = lists
    for gradient, parameter, first, second, master in zip(
        gradients, parameters, firsts, seconds, *(masters or [repeat(None)]), strict=False
    ):
        weight = parameter if master is None else master
        weight.copy_(Settings(*settings).moved(weight.float(), gradient, first, second))
        if master is not None:
            parameter.copy_(master)


def adam_with_remainders(chunk_size: int, overflow: Tensor, lists: Lists, *settings: float) -> None:
    """Update as :func:`adam`, where a master weight is a bfloat16 parameter and an int16 of the bits that it lacks."""
    for gradient, parameter, first, second, remainder in zip(*lists, strict=True):
        weight = Settings(*settings).moved(_join(parameter, remainder), gradient, first, second)
        _split(weight, parameter, remainder)


def _join(parameter: Tensor, remainder: Tensor) -> Tensor:
    high, low = parameter.view(torch.int16).int(), remainder.int()
    # The parameter was rounded up where the remainder, read as signed, is negative.
    high = torch.where(low < 0, high - 1, high)
    return ((high << 16) | (low & 0xFFFF)).view(torch.float32)


def _split(weight: Tensor, parameter: Tensor, remainder: Tensor) -> None:
    bits = weight.view(torch.int32)
    low = (bits & 0xFFFF).to(torch.int16)
    high = torch.where(low < 0, (bits >> 16) + 1, bits >> 16)
    remainder.copy_(low)
    parameter.copy_(high.to(torch.int16).view(torch.bfloat16))


def l2_norm(chunk_size: int, overflow: Tensor, lists: Lists, per_parameter: bool = False) -> tuple[Tensor, Tensor]:
    """Return the norm of all tensors together, float32 ``[1]``, and no norms of each."""
    assert not per_parameter, "not emulated"
    norms = [tensor.float().norm() for tensor in lists[0]]
    return (torch.stack(norms).norm() if norms else torch.zeros(())).reshape(1), torch.zeros(0)


def scale(chunk_size: int, overflow: Tensor, lists: Lists, factor: float) -> None:
    """Write ``factor`` times the first tensors into the second ones."""
    for source, target in zip(*lists, strict=True):
        target.copy_(source.float() * factor)


KERNELS = {
    "multi_tensor_adam": adam,
    "multi_tensor_adam_param_remainder": adam_with_remainders,
    "multi_tensor_l2norm": l2_norm,
    "multi_tensor_scale": scale,
}
