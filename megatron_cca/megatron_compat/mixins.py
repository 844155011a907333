"""Methods put before those of a built module; for megatron-core 0.19.2.

Megatron-Core builds its layers from specs. A spec replaces a whole module; it cannot add to one and leave the names of
its weights as they are. Transformer Engine's layers (2.11 to 2.19) also norm their input, and keep the result.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import rms_norm


def mix_in(module: torch.nn.Module, mixin: type) -> None:
    """Put a class before the module's own, so that its methods are found first and the weights keep their names.

    Not a hook: Megatron's CUDA graphs refuse layers that have hooks.
    """
    module.__class__ = _mixed_class(type(module), mixin)


def take_out(module: torch.nn.Module) -> None:
    """Undo :func:`mix_in`."""
    module.__class__ = type(module).without_mixin


@cache
def _mixed_class(cls: type, mixin: type) -> type:
    return type(f"{mixin.__name__.strip('_')}{cls.__name__}", (mixin, cls), {"without_mixin": cls})


def normed_input(projection: torch.nn.Module, x: Tensor) -> Tensor:
    """Return what a projection multiplies, for its input ``x``, of the same shape.

    Transformer Engine's fused layers norm it themselves and keep the result, so it is done again here.
    """
    weight = getattr(projection, "layer_norm_weight", None)
    if weight is None:
        return x
    assert projection.normalization == "RMSNorm" and not projection.zero_centered_gamma
    return rms_norm(x, (x.size(-1),), weight, projection.eps)
