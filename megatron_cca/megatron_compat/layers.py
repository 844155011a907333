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

from megatron_cca.megatron_compat.relied_on import ReliedOn

_DDP = "megatron.core.distributed.DistributedDataParallel"
_TE = "transformer_engine.pytorch"
RELIED_ON = (
    ReliedOn(
        "megatron.core.tensor_parallel.layers._grad_accum_fusion_available", "says whether apex can fuse gradients"
    ),
    ReliedOn(
        f"{_DDP}._make_forward_pre_hook",
        "waits for a module's own weights; torch keeps it among the module's hooks",
        parameters=("self",),
        says=("def hook(module, *unused)",),
    ),
    ReliedOn(f"{_DDP}.enable_forward_pre_hook", "registers that hook", says=("register_forward_pre_hook(",)),
    ReliedOn(
        f"{_DDP}._make_backward_post_hook",
        "adds no gradient that is in main_grad already, see platform/accumulation.py",
        says=("param.grad_added_to_main_grad", "zero_out_wgrad"),
    ),
    ReliedOn(f"{_DDP}.start_param_sync", "gathers updated weights at once", takes=("force_sync",)),
    ReliedOn(f"{_DDP}.disable_forward_pre_hook", "lets a capture do without gathering", takes=("param_sync",)),
    ReliedOn(_DDP, "has the gradients of a chunk", has=("buffers", "no_sync")),
    ReliedOn(
        "megatron.core.distributed.param_and_grad_buffer._ParamAndGradBuffer", "holds gradients", has=("grad_data",)
    ),
    ReliedOn(
        "megatron.core.models.gpt.GPTModel",
        "the parts of a chunk in the order of its forward pass; rotary_pos_emb is replaced",
        has=("embedding", "decoder", "output_layer", "rotary_pos_emb"),
    ),
    ReliedOn(
        "megatron.core.models.common.embeddings.rotary_pos_embedding.RotaryEmbedding.get_emb",
        "computes the angles of all positions",
        parameters=("self", "max_seq_len", "offset"),
    ),
    ReliedOn(
        "megatron.core.transformer.attention.Attention",
        "builds a core attention by these names and calls it with what is rotated",
        says=("self.core_attention = submodules.core_attention(", "attention_type=self.attention_type"),
    ),
    ReliedOn(
        "megatron.core.transformer.transformer_layer.TransformerLayer",
        "builds norms by these names",
        says=("hidden_size=self.config.hidden_size", "eps=self.config.layernorm_epsilon"),
        has=("self_attention", "mlp"),
    ),
    ReliedOn(
        f"{_TE}.cpp_extensions.general_gemm",
        "adds a product to a sum, see platform/accumulation.py",
        takes=("out_dtype", "layout", "out", "accumulate"),
    ),
    ReliedOn(f"{_TE}.is_fp8_available", "says what a GPU lacks", takes=("return_reason",)),
    ReliedOn(f"{_TE}.is_fp8_block_scaling_available", "says what a GPU lacks", takes=("return_reason",)),
    ReliedOn(f"{_TE}.Linear", "a layer that can add its gradient to main_grad", has=("fuse_wgrad_accumulation",)),
    ReliedOn(
        f"{_TE}.LayerNormLinear",
        "a layer that norms its own input",
        has=("normalization", "zero_centered_gamma", "eps"),
        says=("layer_norm_weight",),
    ),
)


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
