"""Token-by-token decoding with a model of Megatron-Core 0.19.2, without Megatron's inference engine.

Megatron's static inference context rotates all keys again for every token. It also uses a token's index in the batch as
its position. Without this context, a model does not know that it decodes. So this module changes the settings of each
submodule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from megatron.core.models.gpt import GPTModel

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
