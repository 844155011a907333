"""A model of Megatron-Core 0.19.2 that takes one token after another, without its own inference engine.

Its static inference context rotates all keys again for every token, and takes a token's index in the batch for its
position. Without that context nothing in a model says that it decodes, so that it is told here, module by module.
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
    """Within the block, a model takes one token at a time; afterwards it is as it was before, in training or out of it.

    Args:
        gpt: without wrappers.
        new_attention: makes what stands in a layer for its core attention, of the layer's number and softmax scale.

    Returns:
        What it has made, in the order of the layers.
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
    """What a model must not do while one token at a time passes through it."""
    # The cache rotates keys and queries itself.
    yield gpt, "position_embedding_type", "none"
    # Too few rows for FP8's products, which want multiples of 16.
    yield gpt.config, "fp8", None
    if gpt.config.sequence_parallel:
        # One token cannot be split over the ranks.
        yield gpt.config, "sequence_parallel", False
        for module in gpt.modules():
            yield from ((module, name, False) for name in _SEQUENCE_PARALLEL if hasattr(module, name))
