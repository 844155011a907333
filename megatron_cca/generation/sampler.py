"""Draw images: a KV cache (Megatron's own static inference context), Emu3's grammar forced, one random stream an image.

Only visual tokens are drawn, from the softmax over the visual part of the vocabulary; what the grammar dictates is put
in. Each image has its own seed, so that it comes out the same in any batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from megatron_cca import platform
from megatron_cca.errors import UserError
from megatron_cca.generation.guidance import guided_logits
from megatron_cca.models.emu3.grammar import forced_tokens, prompt_ids
from megatron_cca.models.emu3.vocabulary import Emu3Vocabulary


@dataclass(frozen=True)
class ImageRequest:
    """One image to draw: ``caption`` int ``[T]`` text ids, and the seed of its random stream."""

    caption: np.ndarray
    seed: int


@dataclass(frozen=True)
class SamplingSettings:
    """How to draw.

    Attributes:
        height, width: of the grid of visual tokens.
        grid_words: text ids of "H*W".
        guidance_scale: s >= 0 in the paper's convention; 0 is guidance-free, one forward pass a token.
        temperature: > 0; divides the logits.
        batch_size: images drawn at a time.
    """

    height: int
    width: int
    grid_words: Sequence[int]
    guidance_scale: float = 0.0
    temperature: float = 1.0
    batch_size: int = 500

    def __post_init__(self) -> None:
        if not 0 <= self.guidance_scale < float("inf"):
            raise UserError(f"guidance scale: must be 0 or more and finite, found {self.guidance_scale}")
        if not 0 < self.temperature < float("inf"):
            raise UserError(f"temperature: must be more than 0 and finite, found {self.temperature}")


def sample_codes(
    model: torch.nn.Module,
    vocabulary: Emu3Vocabulary,
    requests: Sequence[ImageRequest],
    settings: SamplingSettings,
    on_progress: Callable[[int], None] = lambda images: None,
) -> np.ndarray:
    """Draw one image per request; collective over the tensor-parallel group, which must hold the whole model.

    Args:
        model: a stage of :func:`megatron_cca.models.gpt.build_gpt` without pipeline or sequence parallelism.
        vocabulary: the model's.
        requests: what to draw.
        settings: how to draw it.
        on_progress: called with the number of images just finished.

    Returns:
        int64 codes ``[N, height, width]``.
    """
    assert parallel_state.get_pipeline_model_parallel_world_size() == 1
    was_training = model.training
    model.eval()
    codes = np.empty((len(requests), settings.height, settings.width), dtype=np.int64)
    for batch in _equal_length_batches(requests, settings.batch_size):
        codes[batch] = _draw(model, vocabulary, [requests[index] for index in batch], settings)
        on_progress(len(batch))
    model.train(was_training)
    return codes


def _equal_length_batches(requests: Sequence[ImageRequest], batch_size: int) -> list[list[int]]:
    """Request indices in batches of one caption length: rotary positions are the index, so rows must line up."""
    by_length: dict[int, list[int]] = {}
    for index, request in enumerate(requests):
        by_length.setdefault(len(request.caption), []).append(index)
    return [
        indices[start : start + batch_size]
        for indices in by_length.values()
        for start in range(0, len(indices), batch_size)
    ]


@torch.no_grad()
def _draw(
    model: torch.nn.Module, vocabulary: Emu3Vocabulary, requests: list[ImageRequest], settings: SamplingSettings
) -> np.ndarray:
    forced = forced_tokens(vocabulary, settings.height, settings.width)
    last_visual = int(np.flatnonzero(forced < 0)[-1])
    streams = _streams(model, vocabulary, requests, settings, num_new=last_visual)
    logits = [stream.prefill() for stream in streams]
    uniforms = _uniforms(requests, last_visual + 1)
    drawn = []
    for position in range(last_visual + 1):
        if forced[position] >= 0:
            token = torch.full((len(requests),), int(forced[position]), device=platform.device())
        else:
            token = _draw_visual(logits, vocabulary, settings, uniforms[:, position, None].contiguous())
            drawn.append(token - vocabulary.visual_start)
        if position < last_visual:
            logits = [stream.decode(token) for stream in streams]
    return torch.stack(drawn, dim=1).cpu().numpy().reshape(-1, settings.height, settings.width)


def _streams(model, vocabulary, requests, settings, num_new: int) -> list[_Stream]:
    captions = [[request.caption for request in requests]]
    if settings.guidance_scale > 0:
        captions.append([np.empty(0, dtype=np.int64)] * len(requests))
    prompts = [
        np.stack([prompt_ids(vocabulary, caption, settings.grid_words) for caption in stream]) for stream in captions
    ]
    return [_Stream(model, torch.from_numpy(prompt).to(platform.device()), num_new) for prompt in prompts]


def _uniforms(requests: list[ImageRequest], num_tokens: int) -> Tensor:
    """float64 ``[B, T]`` in [0, 1), each row from its image's own seed."""
    rows = [np.random.default_rng(request.seed).random(num_tokens) for request in requests]
    return torch.from_numpy(np.stack(rows)).to(platform.device())


def _draw_visual(
    logits: list[Tensor], vocabulary: Emu3Vocabulary, settings: SamplingSettings, uniforms: Tensor
) -> Tensor:
    """Token ids ``[B]`` by inverting the cumulative distribution at ``uniforms`` ``[B, 1]``."""
    start = vocabulary.visual_start
    visual = [stream[:, start : start + vocabulary.codebook_size].double() for stream in logits]
    scores = visual[0] if len(visual) == 1 else guided_logits(*visual, settings.guidance_scale)
    cumulative = torch.softmax(scores / settings.temperature, dim=-1).cumsum(dim=-1)
    # The last entry may round to just under 1.
    codes = torch.searchsorted(cumulative, uniforms, right=True).squeeze(1)
    return start + codes.clamp(max=vocabulary.codebook_size - 1)


class _Stream:
    """One sequence a row with its KV cache: the conditional stream, or guidance's unconditional one."""

    def __init__(self, model: torch.nn.Module, prompts: Tensor, num_new: int) -> None:
        self.model = model
        self.prompts = prompts
        self.context = StaticInferenceContext(prompts.size(0), prompts.size(1) + num_new)

    def prefill(self) -> Tensor:
        """Feed the prompts; returns the next token's logits, ``[B, V]``."""
        return self._feed(self.prompts)

    def decode(self, tokens: Tensor) -> Tensor:
        """Feed one token a row, int64 ``[B]``; returns the next token's logits, ``[B, V]``."""
        return self._feed(tokens[:, None])

    def _feed(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
        logits = self.model(
            tokens, positions, None, inference_context=self.context, output_processor=_last_position_logits
        )
        self.context.sequence_len_offset += tokens.size(1)
        return logits


def _last_position_logits(*, hidden_states: Tensor, output_layer, **_unused) -> Tensor:
    logits, _ = output_layer(hidden_states[-1:])
    return gather_from_tensor_model_parallel_region(logits).squeeze(0)
