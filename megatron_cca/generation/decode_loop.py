"""Sample images from a model, in batches of requests, or the best of several candidates per prompt.

Only visual tokens are drawn, from the softmax over the visual part of the vocabulary. The vocabulary's grammar gives
all other tokens. Each image has its own seed. It therefore comes out the same in any batch and on any layout, except
for the rounding of logits: a random number within a rounding error of the border between two codes may select either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_cca import platform
from megatron_cca.errors import UserError
from megatron_cca.generation import DrawingOptions
from megatron_cca.generation.decoder import Decoder, decoding
from megatron_cca.generation.next_code import NO_CODE, contrastive_logits, draw_codes, guided_logits
from megatron_cca.models.image_vocabulary import ImageVocabulary


@dataclass(frozen=True)
class ImageRequest:
    """One image to draw: ``prompt`` int64 ``[P]``, ids up to the image's first, and the seed of its random stream."""

    prompt: np.ndarray
    seed: int | Sequence[int]


@dataclass(frozen=True)
class SamplingSettings(DrawingOptions):
    """The settings of sampling.

    Attributes:
        height, width: of the grid of visual tokens.
        batch_size: images drawn at a time.

    Raises:
        UserError: a number out of its range, or guidance and contrastive decoding together.
    """

    height: int
    width: int
    batch_size: int = 500

    def __post_init__(self) -> None:
        for name, is_right, wanted in (
            ("height", self.height >= 1, "1 or more"),
            ("width", self.width >= 1, "1 or more"),
            ("guidance scale", 0 <= self.guidance_scale < math.inf, "0 or more and finite"),
            ("contrastive top-k", self.contrastive_top_k >= 0, "0 or more"),
            ("contrastive alpha", 0 < self.contrastive_alpha <= 1, "more than 0 and at most 1"),
            ("temperature", 0 <= self.temperature < math.inf, "0 or more and finite"),
            ("top-k", self.top_k >= 0, "0 or more"),
            ("top-p", 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("batch size", self.batch_size >= 1, "1 or more"),
        ):
            if not is_right:
                raise UserError(
                    f"{name}: must be {wanted}, found {getattr(self, name.replace(' ', '_').replace('-', '_'))}"
                )
        if self.guidance_scale > 0 and self.contrastive_top_k > 0:
            raise UserError("contrastive top-k: does not go with a guidance scale; set one of them to 0")

    @property
    def forwards_per_token(self) -> int:
        """The number of forward passes that one token costs."""
        return 2 if self.guidance_scale > 0 or self.contrastive_top_k > 0 else 1


def sample_codes(
    chunks: Sequence[torch.nn.Module],
    vocabulary: ImageVocabulary,
    requests: Sequence[ImageRequest],
    settings: SamplingSettings,
    unconditional: np.ndarray | None = None,
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> np.ndarray:
    """Draw one image per request. Collective over the tensor- and pipeline-parallel ranks, which all get the result.

    Args:
        chunks: this rank's model chunks, see :class:`Decoder`. They are left as they were.
        vocabulary: the model's.
        requests: what to draw.
        settings: how to draw it.
        unconditional: int64 ``[U]``, the prompt of the second stream, with an empty or a negative caption. Needed where
            ``settings`` take two passes per token.
        on_tokens: called with the number of visual tokens that were just drawn.

    Returns:
        int64 codes ``[N, height, width]``.

    Raises:
        UserError: logits that are not finite.
    """
    assert settings.forwards_per_token == 1 or unconditional is not None
    codes = np.empty((len(requests), settings.height, settings.width), dtype=np.int64)
    with decoding(chunks, vocabulary) as decoder:
        for batch in _batches(requests, settings.batch_size):
            drawn = _draw(decoder, vocabulary, [requests[index] for index in batch], settings, unconditional, on_tokens)
            codes[batch] = drawn.reshape(-1, settings.height, settings.width)
    return codes


def _batches(requests: Sequence[ImageRequest], batch_size: int) -> list[list[int]]:
    """Return request indices in batches of prompts of similar length. Prompts of equal length need no mask."""
    order = sorted(range(len(requests)), key=lambda index: len(requests[index].prompt))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


class _Group:
    """Images that pass through the model together, with their random numbers. The conditional stream comes first."""

    def __init__(
        self,
        decoder: Decoder,
        requests: Sequence[ImageRequest],
        unconditional: np.ndarray | None,
        num_new: int,
    ) -> None:
        self.decoder = decoder
        streams = [[request.prompt for request in requests]]
        if unconditional is not None:
            streams.append([unconditional] * len(requests))
        self._prompts = [_filled_up(prompts) for prompts in streams]
        self._caches = [decoder.new_cache(tokens.size(1) + num_new) for tokens, _ in self._prompts]
        rows = [np.random.default_rng(request.seed).random(num_new + 1) for request in requests]
        self.uniforms = torch.from_numpy(np.stack(rows)).to(platform.device())

    def feed_prompts(self) -> None:
        """Feed the prompts, and keep the logits of the first token in ``logits``."""
        pairs = zip(self._caches, self._prompts, strict=True)
        self.logits = [self.decoder.feed(cache, tokens, counts) for cache, (tokens, counts) in pairs]

    def feed(self, tokens: Tensor) -> None:
        """Feed one token per row, int64 ``[B]``, to all streams."""
        self.logits = [self.decoder.feed(cache, tokens[:, None]) for cache in self._caches]


def _filled_up(prompts: Sequence[np.ndarray]) -> tuple[Tensor, Tensor | None]:
    """Return prompts padded on the right, int64 ``[B, longest]``, and lengths int64 ``[B]``.

    No lengths if all are equal.
    """
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    tokens = torch.zeros((len(prompts), int(lengths.max())), dtype=torch.int64)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = torch.from_numpy(prompt)
    is_ragged = bool((lengths != lengths[0]).any())
    return tokens.to(platform.device()), lengths.to(platform.device()) if is_ragged else None


def _draw(
    decoder: Decoder,
    vocabulary: ImageVocabulary,
    requests: Sequence[ImageRequest],
    settings: SamplingSettings,
    unconditional: np.ndarray | None,
    on_tokens: Callable[[int], None],
) -> np.ndarray:
    """Draw a batch of requests, and return codes int64 ``[B, height * width]``."""
    forced = vocabulary.forced_tokens(settings.height, settings.width)
    last_visual = int(np.flatnonzero(forced < 0)[-1])
    second = unconditional if settings.forwards_per_token == 2 else None
    # One group per pipeline stage, so that all stages work at the same time.
    parts = np.array_split(np.arange(len(requests)), min(len(requests), _pipeline_size()))
    groups = [_Group(decoder, [requests[index] for index in part], second, last_visual) for part in parts]
    for group in groups:
        group.feed_prompts()
    drawn = []
    for position in range(last_visual + 1):
        if forced[position] >= 0:
            tokens = torch.full((len(requests),), int(forced[position]), device=platform.device())
        else:
            codes = _agreed_codes(decoder, groups, position, settings)
            drawn.append(codes)
            tokens = codes + vocabulary.visual_start
            on_tokens(len(requests))
        if position < last_visual:
            for group, part in zip(groups, tokens.tensor_split([p[0] for p in parts[1:]]), strict=True):
                group.feed(part)
    codes = torch.stack(drawn, dim=1).cpu().numpy()
    if (codes == NO_CODE).any():
        raise UserError(
            "the model's logits are not finite numbers: its weights are damaged, or guidance scale or temperature lead "
            "beyond what float32 holds"
        )
    return codes


def _pipeline_size() -> int:
    return parallel_state.get_pipeline_model_parallel_world_size()


def _agreed_codes(decoder: Decoder, groups: Sequence[_Group], position: int, settings: SamplingSettings) -> Tensor:
    """Return codes of all groups, int64 ``[B]``. The last pipeline stage draws them and sends them to the others."""
    if decoder.is_last_stage:
        codes = torch.cat([_codes(group.logits, group.uniforms[:, position], settings) for group in groups])
    else:
        codes = torch.empty(sum(len(group.uniforms) for group in groups), dtype=torch.int64, device=platform.device())
    if _pipeline_size() > 1:
        group = parallel_state.get_pipeline_model_parallel_group()
        dist.broadcast(codes, parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
    return codes


def _codes(logits: Sequence[Tensor], uniforms: Tensor, settings: SamplingSettings) -> Tensor:
    if settings.contrastive_top_k > 0:
        scores = contrastive_logits(*logits, settings.contrastive_top_k, settings.contrastive_alpha)
    elif settings.guidance_scale > 0:
        scores = guided_logits(*logits, settings.guidance_scale)
    else:
        scores = logits[0]
    return draw_codes(scores, uniforms, temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p)


SCORER = "--scorer"

Scorer = Callable[[np.ndarray, Sequence[str]], np.ndarray]
"""A function of images uint8 ``[N, H, W, 3]`` and their prompts that returns one score per image. Larger is better."""


def cut_prompts(scorer: Scorer | None, prompts: Sequence[str]) -> Any | None:
    """Return how many of the prompts a scorer reads in part, by its ``cut``. None for a scorer without ``cut``."""
    cut = getattr(scorer, "cut", None)
    return None if cut is None else cut(prompts)


def candidates(requests: Sequence[ImageRequest], count: int) -> list[ImageRequest]:
    """Return each request ``count`` times in a row. The first keeps its seed. The others have seeds derived from it."""
    return [
        request if turn == 0 else replace(request, seed=[request.seed, turn])
        for request in requests
        for turn in range(count)
    ]


@dataclass(frozen=True)
class BestCandidates:
    """The best candidates: int64 ``[N]`` indices into all images, and their float64 ``[N]`` scores."""

    indices: np.ndarray
    scores: np.ndarray


def best_candidates(scorer: Scorer, images: np.ndarray, prompts: Sequence[str], count: int) -> BestCandidates:
    """Return the best of every ``count`` consecutive images. Ties go to the first.

    Args:
        scorer: from :func:`open_scorer`.
        images: uint8 ``[N * count, H, W, 3]``.
        prompts: N.
        count: candidates per prompt.
    """
    scores = scorer(images, [prompt for prompt in prompts for _ in range(count)]).reshape(-1, count)
    places = scores.argmax(axis=1)
    rows = np.arange(len(prompts))
    return BestCandidates(rows * count + places, scores[rows, places].astype(np.float64))
