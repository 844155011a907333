"""Methods put before those of a built module, and token-by-token decoding with a model of Megatron-Core 0.19.2.

Megatron-Core builds its layers from specs. A spec replaces a whole module; it cannot add to one and leave the names of
its weights as they are. Transformer Engine's layers (2.11 to 2.19) also norm their input, and keep the result.

Megatron's static inference context rotates all keys again for every token. It also uses a token's index in the batch as
its position. Without this context, a model does not know that it decodes. So this module changes the settings of each
submodule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache

import torch
from megatron.core.models.gpt import GPTModel
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


_SEQUENCE_PARALLEL = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")


@contextmanager
def fed_token_by_token[Attention: torch.nn.Module](
    gpt: GPTModel, new_attention: Callable[[int, float | None], Attention]
) -> Iterator[list[Attention]]:
    """Let a model take one token at a time within the block. Afterwards restore it, also its training mode.

    Args:
        gpt: the model, without wrappers.
        new_attention: makes the replacement of a layer's core attention, from layer number and softmax scale.

    Returns:
        The replacements, in the order of the layers.
    """
    with ExitStack() as stack:
        for module, name, value in _changes(gpt):
            _set(stack, module, name, value)
        stack.callback(gpt.train, gpt.training)
        gpt.eval()
        made = []
        for layer in gpt.decoder.layers:
            attention = layer.self_attention
            made.append(new_attention(layer.layer_number, getattr(attention.core_attention, "softmax_scale", None)))
            _set(stack, attention, "core_attention", made[-1])
        yield made


def _set(stack: ExitStack, thing: object, name: str, value: object) -> None:
    stack.callback(setattr, thing, name, getattr(thing, name))
    setattr(thing, name, value)


def _changes(gpt: GPTModel) -> Iterator[tuple[object, str, object]]:
    """Yield the changes for decoding: object, name of its attribute, and value."""
    # The cache rotates keys and queries itself.
    yield gpt, "position_embedding_type", "none"
    # FP8 products need a multiple of 16 rows. Decoding has fewer.
    yield gpt.config, "fp8", None
    if gpt.config.sequence_parallel:
        # One token cannot be split over the ranks.
        yield gpt.config, "sequence_parallel", False
        for module in gpt.modules():
            yield from ((module, name, False) for name in _SEQUENCE_PARALLEL if hasattr(module, name))
