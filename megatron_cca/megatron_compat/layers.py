"""What the project does to single modules of a built model, from outside; for megatron-core 0.19.2.

Megatron-Core builds its layers from specs. A spec replaces a whole module; it cannot add to one and leave the names of
its weights as they are. Nor does Megatron-Core say when a weight has arrived that is used without its module's forward,
or fuse the gradients of Transformer Engine's layers (2.11 to 2.19) without apex.
"""

from __future__ import annotations

from functools import cache

import torch
from megatron.core.tensor_parallel import layers
from torch import Tensor
from torch.nn.functional import rms_norm


def await_parameters(module: torch.nn.Module) -> None:
    """Wait until the module's own weights are those of the last update; at once where nothing is on its way.

    With ``optimizer.overlap_param_gather`` Megatron's DDP waits when a module's forward begins. Whoever takes a weight
    past that, as the LM head's tiles do, calls this first. Collective over the ranks that share the weight's update.
    """
    for hook in module._forward_pre_hooks.values():
        hook(module, ())


def apex_fuses_gradients() -> bool:
    """Return whether apex is there to add weight gradients of Megatron's own layers to its buffer."""
    return layers._grad_accum_fusion_available


def fuse_engine_gradients(gpt: torch.nn.Module) -> None:
    """Let Transformer Engine's layers add their weight gradients to Megatron's buffer.

    Megatron's flag would do it, but refuses to build the LM head without apex; and the head's gradient is our own.
    """
    for module in gpt.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True


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
