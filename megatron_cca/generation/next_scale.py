"""Draw images scale by scale from a model of next-scale prediction: one forward pass for each grid of the pyramid.

All codes of a scale are drawn at once. Guidance grows with the scale, as in the authors' program (FoundationVision/VAR,
``autoregressive_infer_cfg``): scale k of K gets ``k / (K - 1)`` of the guidance scale. Each image has its own seed. It
comes out the same in any batch and on any layout, except for the rounding of logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_cca import platform
from megatron_cca.generation.decode_loop import ImageRequest, SamplingSettings, next_codes
from megatron_cca.generation.decoder import visual_logits
from megatron_cca.megatron_compat.decoding import fed_token_by_token
from megatron_cca.models.gpt import unwrapped_gpt
from megatron_cca.models.image_vocabulary import ImageVocabulary
from megatron_cca.models.next_scale import NextScaleModel
from megatron_cca.models.pyramid import num_codes

# Logits that are drawn from together: 1 GB.
_LOGITS_AT_ONCE = 2**28


class _GrowingAttention(torch.nn.Module):
    """A replacement of a layer's core attention that keeps the keys and values of all scales so far."""

    def __init__(self, _layer: int, softmax_scale: float | None) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale
        self.forget()

    def forget(self) -> None:
        """Drop all keys and values."""
        self._kept: list[tuple[Tensor, Tensor]] = []

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_unused, **_unused_too) -> Tensor:
        """Return the attention ``[S, B, heads * D]`` of a scale to itself and to all scales before it."""
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        self._kept.append((key, value))
        keys, values = (torch.cat(parts, 2) for parts in zip(*self._kept, strict=True))
        self._kept = [(keys, values)]
        context = scaled_dot_product_attention(query, keys, values, scale=self.softmax_scale)
        return context.permute(2, 0, 1, 3).flatten(2)


@contextmanager
def scale_by_scale(
    chunks: Sequence[torch.nn.Module], vocabulary: ImageVocabulary
) -> Iterator[Callable[..., np.ndarray]]:
    """Prepare a model for drawing, and restore it at the end of the block.

    Args:
        chunks: this rank's, of :func:`megatron_cca.models.gpt.build_gpt`. Any TP, with or without wrappers.
        vocabulary: the model's.

    Returns:
        A function of requests (each with a prompt of one class), settings, the prompt of the second stream int64
        ``[1]`` or None, and what to call with the number of codes that were just drawn. It returns codes int64
        ``[B, N]``. Collective over the tensor-parallel ranks.
    """
    model = unwrapped_gpt(chunks[0])
    with fed_token_by_token(model, _GrowingAttention) as attentions:
        yield partial(_drawn, model, attentions, vocabulary)


@torch.no_grad()
def _drawn(
    model: NextScaleModel,
    attentions: Sequence[_GrowingAttention],
    vocabulary: ImageVocabulary,
    requests: Sequence[ImageRequest],
    settings: SamplingSettings,
    on_tokens: Callable[[int], None],
) -> np.ndarray:
    for attention in attentions:
        attention.forget()
    embedding, scales = model.embedding, model.embedding.scales
    prompts, streams = [request.prompt for request in requests], settings.forwards_per_token
    prompts += [request.second for request in requests] * (streams - 1)
    condition = embedding.condition(torch.from_numpy(np.stack(prompts)).to(platform.device()))
    uniforms = _uniforms(requests, num_codes(scales))
    picture, drawn, start = 0, [], 0
    for number, side in enumerate(scales):
        if number == 0:
            rows = embedding.first_scale(condition)
        else:
            rows = embedding.later_scale(picture.repeat(streams, 1, 1, 1), number)
        logits = _logits(model, vocabulary, rows, condition)
        guided = replace(settings, guidance_scale=settings.guidance_scale * number / max(len(scales) - 1, 1))
        codes = _codes(logits, uniforms[:, start : start + side**2], guided, streams)
        drawn.append(codes)
        picture = picture + embedding.features.added(codes.clamp(min=0), number)
        start += side**2
        on_tokens(codes.numel())
    return torch.cat(drawn, 1).cpu().numpy()


def _uniforms(requests: Sequence[ImageRequest], count: int) -> Tensor:
    rows = [np.random.default_rng(request.seed).random(count) for request in requests]
    return torch.from_numpy(np.stack(rows)).to(platform.device())


def _logits(model: NextScaleModel, vocabulary: ImageVocabulary, rows: Tensor, condition: Tensor) -> Tensor:
    """Return the logits of a scale's codes, float32 ``[streams * B, N, K]``, for its inputs ``[N, streams * B, H]``."""
    hidden = model.decoder(hidden_states=rows, attention_mask=None, context=condition)
    hidden = model.modulated_for_head(hidden, condition)
    return visual_logits(hidden.transpose(0, 1).flatten(0, 1), model.output_layer, vocabulary).unflatten(
        0, (len(condition), -1)
    )


def _codes(logits: Tensor, uniforms: Tensor, settings: SamplingSettings, streams: int) -> Tensor:
    """Return codes int64 ``[B, N]``."""
    images, places, size = len(uniforms), uniforms.size(1), logits.size(-1)
    by_stream = [stream.reshape(images * places, size) for stream in logits.chunk(streams)]
    at_once = max(1, _LOGITS_AT_ONCE // size)
    cut = zip(*(stream.split(at_once) for stream in by_stream), strict=True)
    parts = zip(cut, uniforms.reshape(-1).split(at_once), strict=True)
    return torch.cat([next_codes(part, numbers, settings) for part, numbers in parts]).view(images, places)
