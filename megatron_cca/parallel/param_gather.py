"""For weights that are used without their module's forward, while Megatron gathers updated ones beside the pass."""

from __future__ import annotations

import torch


def await_parameters(module: torch.nn.Module) -> None:
    """Wait until the module's own weights are those of the last update; at once where nothing is on its way.

    With ``optimizer.overlap_param_gather`` Megatron's DDP waits when a module's forward begins. Whoever takes a weight
    past that, as the LM head's tiles do, calls this first. Collective over the ranks that share the weight's update.
    """
    for hook in module._forward_pre_hooks.values():
        hook(module, ())
