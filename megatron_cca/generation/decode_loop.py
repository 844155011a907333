"""Sample the codes of images from a model, token by token, and choose the best of several candidates per prompt.

Only visual tokens are drawn, from the softmax over the visual part of the vocabulary. The vocabulary's grammar gives
all other tokens. Each image has its own seed. It therefore comes out the same in any batch and on any layout, except
for the rounding of logits: a random number within a rounding error of the border between two codes may select either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.nn.functional import pad

from megatron_cca import platform
from megatron_cca.errors import UserError
from megatron_cca.generation import SamplingOptions
from megatron_cca.generation.decoder import Decoder, decoding
from megatron_cca.models.image_vocabulary import ImageVocabulary

SCORER = "--scorer"
Scorer = Callable[[np.ndarray, Sequence[str]], np.ndarray]
"""A function of images uint8 ``[N, H, W, 3]`` and their prompts that returns one score per image. Larger is better."""
# Codes per block. The sums of blocks are searched first, then the codes of one block.
_BLOCK = 128
# What :func:`draw_codes` returns where no code can be drawn.
NO_CODE = -1


@dataclass(frozen=True)
class ImageRequest:
    """One image to draw.

    Attributes:
        prompt: int64 ``[P]``, ids up to the image's first.
        seed: of its random stream.
        second: int64 ``[U]``, the prompt of the second stream, with a dropped or a negative caption. Needed where
            settings take two streams.
    """

    prompt: np.ndarray
    seed: int | Sequence[int]
    second: np.ndarray | None = None


@dataclass(frozen=True)
class SamplingSettings(SamplingOptions):
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
        """The number of forward passes of a row that one token costs: 2 with a second stream."""
        return 2 if self.guidance_scale > 0 or self.contrastive_top_k > 0 else 1


def sample_codes(
    chunks: Sequence[torch.nn.Module],
    vocabulary: ImageVocabulary,
    requests: Sequence[ImageRequest],
    settings: SamplingSettings,
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> np.ndarray:
    """Draw one image per request. Collective over the tensor- and pipeline-parallel ranks, which all get the result.

    Args:
        chunks: this rank's model chunks, see :class:`Decoder`. They are left as they were.
        vocabulary: the model's.
        requests: what to draw.
        settings: how to draw it.
        on_tokens: called with the number of visual tokens that were just drawn.

    Returns:
        int64 codes ``[N, height, width]``.

    Raises:
        UserError: logits that are not finite.
    """
    assert settings.forwards_per_token == 1 or all(request.second is not None for request in requests)
    codes = np.empty((len(requests), settings.height, settings.width), dtype=np.int64)
    opened = _token_by_token
    if vocabulary.scales:
        from megatron_cca.generation.next_scale import scale_by_scale as opened
    with opened(chunks, vocabulary) as draw:
        for batch in _batches(requests, settings.batch_size):
            drawn = draw([requests[index] for index in batch], settings, on_tokens)
            if (drawn == NO_CODE).any():
                raise UserError(
                    "the model's logits are not finite numbers: its weights are damaged, or guidance scale or "
                    "temperature lead beyond what float32 holds"
                )
            codes[batch] = drawn.reshape(-1, settings.height, settings.width)
    return codes


@contextmanager
def _token_by_token(
    chunks: Sequence[torch.nn.Module], vocabulary: ImageVocabulary
) -> Iterator[Callable[..., np.ndarray]]:
    with decoding(chunks, vocabulary) as decoder:
        yield partial(_sample_batch, decoder, vocabulary)


def guided_logits(conditional: Tensor, unconditional: Tensor, guidance_scale: float) -> Tensor:
    """Return the guided logits ``(1 + s) * conditional - s * unconditional`` (arXiv 2410.09347, equation 3).

    The argument ``guidance_scale`` is s, and 0 is guidance-free. Emu3's and LlamaGen's own programs call 1 + s the
    scale.
    """
    return conditional + guidance_scale * (conditional - unconditional)


def contrastive_logits(conditional: Tensor, unconditional: Tensor, top_k: int, alpha: float) -> Tensor:
    """Return the logits of contrastive decoding with a top-k set, CD-K (CM3Leon, arXiv 2309.02591, section 3.4).

    The method is from arXiv 2210.15097. The conditional distribution is the expert and the unconditional one the
    amateur. A token is kept if its probability for the expert is at least ``alpha`` times that of the expert's k-th
    likeliest token. The logit of a kept token is log expert - log amateur.

    Args:
        conditional, unconditional: logits ``[B, K]``.
        top_k: k, at least 1. 1 is the original contrastive decoding. Above K it is K.
        alpha: in (0, 1].

    Returns:
        ``[B, K]``, minus infinity where a token is not kept.
    """
    expert, amateur = conditional.log_softmax(-1), unconditional.log_softmax(-1)
    threshold = expert.topk(min(top_k, expert.size(-1)), dim=-1).values[:, -1:]
    return (expert - amateur).masked_fill(expert < threshold + torch.tensor(alpha).log(), -torch.inf)


def draw_codes(logits: Tensor, uniforms: Tensor, *, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Return codes int64 ``[B]``, drawn from the logits with one random number per row.

    The codes depend on the arguments alone. A row whose logits are not finite gets ``NO_CODE``.

    Args:
        logits: float32 ``[B, K]``. Minus infinity rules a code out.
        uniforms: float64 ``[B]`` in [0, 1).
        temperature: divides the logits. 0 takes the likeliest code.
        top_k: only the k likeliest codes (and any as likely as the k-th) are drawn. 0 means all.
        top_p: after that, only the likeliest codes that together reach this probability (arXiv 1904.09751). 1 is all.
    """
    if temperature not in (0, 1):
        logits = logits / temperature
    top = logits.amax(-1, keepdim=True)
    greedy = temperature == 0
    codes = logits.argmax(-1, keepdim=True) if greedy else _random_codes(logits, top, uniforms, top_k, top_p)
    # NaN and plus infinity show in the maximum. A code says so, since a check here would wait for the device.
    return torch.where(top.isfinite(), codes, NO_CODE).squeeze(1)


def cut_prompts(scorer: Scorer | None, prompts: Sequence[str]) -> Any | None:
    """Return how many of the prompts a scorer reads in part, by its ``cut``. None for a scorer without ``cut``."""
    cut = getattr(scorer, "cut", None)
    return None if cut is None else cut(prompts)


def candidate_requests(requests: Sequence[ImageRequest], count: int) -> list[ImageRequest]:
    """Return each request ``count`` times in a row. The first keeps its seed. The others have seeds derived from it."""
    return [
        request if candidate == 0 else replace(request, seed=[request.seed, candidate])
        for request in requests
        for candidate in range(count)
    ]


@dataclass(frozen=True)
class BestCandidates:
    """The best candidates: int64 ``[N]`` indices into all images, and their float64 ``[N]`` scores."""

    indices: np.ndarray
    scores: np.ndarray


def best_candidates(scorer: Scorer, images: np.ndarray, prompts: Sequence[str], count: int) -> BestCandidates:
    """Return the best of every ``count`` consecutive images. Ties go to the first.

    Args:
        scorer: says which images are good.
        images: uint8 ``[N * count, H, W, 3]``.
        prompts: N.
        count: candidates per prompt.
    """
    scores = scorer(images, [prompt for prompt in prompts for _ in range(count)]).reshape(-1, count)
    places = scores.argmax(axis=1)
    rows = np.arange(len(prompts))
    return BestCandidates(rows * count + places, scores[rows, places].astype(np.float64))


def _batches(requests: Sequence[ImageRequest], batch_size: int) -> list[list[int]]:
    """Return request indices in batches of prompts of similar length. Prompts of equal length need no mask."""
    order = sorted(range(len(requests)), key=lambda index: len(requests[index].prompt))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


class _RequestGroup:
    """Requests that pass through the model together, with their random numbers.

    A second stream are further rows of the same pass, behind those of the first: at small batches a pass costs as much
    as the weights that it reads.
    """

    def __init__(
        self,
        decoder: Decoder,
        requests: Sequence[ImageRequest],
        num_streams: int,
        num_new: int,
    ) -> None:
        self.decoder, self._num_streams = decoder, num_streams
        streams = [[request.prompt for request in requests], [request.second for request in requests]][:num_streams]
        self._prompts = _padded([prompt for prompts in streams for prompt in prompts])
        self._cache = decoder.new_cache(self._prompts[0].size(1) + num_new)
        rows = [np.random.default_rng(request.seed).random(num_new + 1) for request in requests]
        self.uniforms = torch.from_numpy(np.stack(rows)).to(platform.device())

    def feed_prompts(self) -> None:
        """Feed the prompts, and keep the logits of the first token, by stream, in ``logits``."""
        self._keep(self.decoder.feed(self._cache, *self._prompts))

    def feed(self, tokens: Tensor) -> None:
        """Feed one token per request, int64 ``[B]``, to all streams."""
        self._keep(self.decoder.feed(self._cache, tokens.repeat(self._num_streams)[:, None]))

    def _keep(self, logits: Tensor | None) -> None:
        # Only the last pipeline stage has any.
        self.logits = () if logits is None else logits.chunk(self._num_streams)


def _padded(prompts: Sequence[np.ndarray]) -> tuple[Tensor, Tensor | None]:
    """Return prompts padded on the right, int64 ``[B, longest]``, and lengths int64 ``[B]``.

    No lengths if all are equal.
    """
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    tokens = torch.zeros((len(prompts), int(lengths.max())), dtype=torch.int64)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = torch.from_numpy(prompt)
    is_ragged = bool((lengths != lengths[0]).any())
    return tokens.to(platform.device()), lengths.to(platform.device()) if is_ragged else None


def _sample_batch(
    decoder: Decoder,
    vocabulary: ImageVocabulary,
    requests: Sequence[ImageRequest],
    settings: SamplingSettings,
    on_tokens: Callable[[int], None],
) -> np.ndarray:
    """Draw a batch of requests, and return codes int64 ``[B, height * width]``."""
    forced = vocabulary.forced_tokens(settings.height, settings.width)
    last_visual = int(np.flatnonzero(forced < 0)[-1])
    # One group per pipeline stage, so that all stages work at the same time.
    parts = np.array_split(np.arange(len(requests)), min(len(requests), _pipeline_size()))
    streams = settings.forwards_per_token
    groups = [_RequestGroup(decoder, [requests[index] for index in part], streams, last_visual) for part in parts]
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
            for group, part in zip(groups, tokens.tensor_split([indices[0] for indices in parts[1:]]), strict=True):
                group.feed(part)
    return torch.stack(drawn, dim=1).cpu().numpy()


def _pipeline_size() -> int:
    return parallel_state.get_pipeline_model_parallel_world_size()


def _agreed_codes(
    decoder: Decoder, groups: Sequence[_RequestGroup], position: int, settings: SamplingSettings
) -> Tensor:
    """Return codes of all groups, int64 ``[B]``. The last pipeline stage draws them and sends them to the others."""
    if decoder.is_last_stage:
        codes = torch.cat([next_codes(group.logits, group.uniforms[:, position], settings) for group in groups])
    else:
        codes = torch.empty(sum(len(group.uniforms) for group in groups), dtype=torch.int64, device=platform.device())
    if _pipeline_size() > 1:
        group = parallel_state.get_pipeline_model_parallel_group()
        dist.broadcast(codes, parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
    return codes


def next_codes(logits: Sequence[Tensor], uniforms: Tensor, settings: SamplingSettings) -> Tensor:
    """Return codes int64 ``[B]``, drawn from the logits ``[B, K]`` of one or two streams, with ``uniforms`` ``[B]``."""
    if settings.contrastive_top_k > 0:
        scores = contrastive_logits(*logits, settings.contrastive_top_k, settings.contrastive_alpha)
    elif settings.guidance_scale > 0:
        scores = guided_logits(*logits, settings.guidance_scale)
    else:
        scores = logits[0]
    return draw_codes(scores, uniforms, temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p)


def _random_codes(logits: Tensor, top: Tensor, uniforms: Tensor, top_k: int, top_p: float) -> Tensor:
    """Return a random code for each row, ``[B, 1]``."""
    weights = (logits - top).exp_()
    if 0 < top_k < logits.size(-1):
        weights *= logits >= _kth_largest(logits, top_k)
    if top_p < 1:
        weights = _nucleus(weights, top_p)
    return _by_inversion(weights, uniforms)


def _kth_largest(logits: Tensor, k: int) -> Tensor:
    """Return the k-th largest logit of each row, ``[B, 1]``."""
    if logits.device.type == "cpu":
        # Takes a third of the time of torch.topk on a CPU.
        place = logits.size(-1) - k
        return torch.from_numpy(np.partition(logits.numpy(), place, axis=-1)[:, place, None])
    return logits.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)


def _nucleus(weights: Tensor, top_p: float) -> Tensor:
    """Return the weights with 0 outside the smallest set of likeliest codes whose share is at least ``top_p``."""
    sorted_ones, order = weights.double().sort(dim=-1, descending=True)
    before = sorted_ones.cumsum(-1) - sorted_ones
    is_in = before < top_p * sorted_ones.sum(-1, keepdim=True)
    return weights * torch.empty_like(is_in).scatter_(-1, order, is_in)


def _by_inversion(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Return the first code whose cumulated weight exceeds ``uniforms`` times the sum of weights, ``[B, 1]``.

    Sums are float64. Blocks are searched first, then the codes of one block.
    """
    blocks = pad(weights, (0, -weights.size(-1) % _BLOCK)).unflatten(-1, (-1, _BLOCK))
    sums = blocks.sum(-1, dtype=torch.float64)
    edges = sums.cumsum(-1)
    heights = uniforms[:, None] * edges[:, -1:]
    block = _first_above(edges, heights)
    inner = blocks.gather(1, block[..., None].expand(-1, -1, _BLOCK)).squeeze(1).double().cumsum(-1)
    heights = heights - (edges - sums).gather(1, block)
    return block * _BLOCK + _first_above(inner, heights)


def _first_above(cumulated: Tensor, heights: Tensor) -> Tensor:
    """Return the first place whose cumulated weight is above the height, ``[B, 1]``.

    Rounding never leads past the last one.
    """
    top = cumulated[:, -1:]
    places = torch.searchsorted(cumulated, heights.minimum(top.nextafter(torch.zeros_like(top))), right=True)
    return places.clamp_(max=cumulated.size(-1) - 1)  # searchsorted puts NaN behind the last place
