"""Changes to single modules of a built model, for megatron-core 0.19.2.

Megatron-Core does not say when a weight has arrived that is used without its module's forward. Nor does it fuse the
gradients of Transformer Engine's layers (2.11 to 2.19) without apex.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import layers


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
