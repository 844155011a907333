"""Changes to single modules of a built model, for megatron-core 0.19.2.

Megatron-Core builds its layers from specs. A spec replaces a whole module. It cannot add to a module without changing
the names of its weights. Megatron-Core also has no function to wait for a weight that is used without its module's
forward. Without apex, it does not fuse the gradients of Transformer Engine's layers (2.11 to 2.19).
"""

from __future__ import annotations

from functools import cache

import torch
from megatron.core.tensor_parallel import layers
from torch import Tensor
from torch.nn.functional import rms_norm


def await_parameters(module: torch.nn.Module) -> None:
    """Wait until the module's own weights are updated. Return at once if no update is on its way.

    With ``optimizer.overlap_param_gather``, Megatron's DDP waits when a module's forward begins. Call this function
    before using a weight without that forward, as the tiles of the LM head do. Collective over the ranks that share the
    weight's update.
    """
    for hook in module._forward_pre_hooks.values():
        hook(module, ())


def apex_fuses_gradients() -> bool:
    """Return whether apex is installed. It adds weight gradients of Megatron's own layers to Megatron's buffer."""
    return layers._grad_accum_fusion_available


def fuse_engine_gradients(gpt: torch.nn.Module) -> None:
    """Let Transformer Engine's layers add their weight gradients to Megatron's buffer.

    Megatron's flag does the same, but then Megatron refuses to build the LM head without apex. The head does not need
    the flag: this package computes its gradient.
    """
    for module in gpt.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True


def mix_in(module: torch.nn.Module, mixin: type) -> None:
    """Put a class before the module's own class. Its methods are then found first. The weights keep their names.

    A hook would not work: Megatron's CUDA graphs refuse layers with hooks.
    """
    module.__class__ = _mixed_class(type(module), mixin)


def take_out(module: torch.nn.Module) -> None:
    """Undo :func:`mix_in`."""
    module.__class__ = type(module).without_mixin


@cache
def _mixed_class(cls: type, mixin: type) -> type:
    return type(f"{mixin.__name__.strip('_')}{cls.__name__}", (mixin, cls), {"without_mixin": cls})


def normed_input(projection: torch.nn.Module, x: Tensor) -> Tensor:
    """Return the tensor that a projection multiplies for its input ``x``. It has the shape of ``x``.

    Transformer Engine's fused layers normalise the input inside and do not return it. So this repeats the norm.
    """
    weight = getattr(projection, "layer_norm_weight", None)
    if weight is None:
        return x
    assert projection.normalization == "RMSNorm" and not projection.zero_centered_gamma
    return rms_norm(x, (x.size(-1),), weight, projection.eps)
