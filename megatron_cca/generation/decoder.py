"""Autoregressive decoding with Megatron's layers over tensor- and pipeline-parallel ranks, one token at a time.

Megatron's static inference context stores keys without their rotation and rotates all of them again for every token. It
also takes a token's index in the batch for its position. Here keys are rotated once, and each row has its own
positions. Prompts of different lengths can therefore be decoded together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from megatron_cca import platform
from megatron_cca.megatron_compat.decoding import fed_token_by_token
from megatron_cca.models.gpt import unwrapped_gpt
from megatron_cca.models.image_vocabulary import ImageVocabulary
from megatron_cca.models.rotary_2d import Rotation, rotation_of


class KVCache:
    """The keys and values of everything that one stream of sequences has been fed.

    Args:
        max_length: how many tokens a row may hold at most.
        rotation: of at least ``max_length`` positions.
    """

    def __init__(self, max_length: int, rotation: Rotation) -> None:
        self.max_length, self._rotation = max_length, rotation
        self.lengths: Tensor | None = None
        """int64 ``[B]``: tokens fed to each row."""
        self.longest = 0
        """How many places are in use: the tokens of the longest row, padding of the prompts included."""
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def begin(self, tokens: Tensor, counts: Tensor | None) -> None:
        """Announce the next tokens: the prompts at first, then one token per row.

        Args:
            tokens: int64 ``[B, S]``, padded on the right. S is 1 except for the prompts.
            counts: int64 ``[B]``, how many of a row's tokens count. None means all.
        """
        batch, width = tokens.shape
        self.is_prompt = self.lengths is None
        assert self.is_prompt or width == 1, "after the prompts one token a row is fed"
        if self.is_prompt:
            self.lengths = torch.zeros(batch, dtype=torch.int64, device=tokens.device)
            self._is_ragged = counts is not None and bool((counts != counts[0]).any())
        self._slots = self.lengths
        self.lengths = self.lengths + (width if counts is None else counts)
        # A count on the host: decoding must not wait for the device.
        self.longest += width
        self._set_rotation()

    def _set_rotation(self) -> None:
        self._cos_sin = self._of_what_is_fed(self._rotation.cos), self._of_what_is_fed(self._rotation.sin)
        places = torch.arange(self.longest, device=self._slots.device)
        self._mask = (places <= self._slots[:, None])[:, None, None] if self._is_ragged else None

    def _of_what_is_fed(self, table: Tensor) -> Tensor:
        if self.is_prompt:
            return table[: self.longest, None, None]
        if self._is_ragged:
            return table[self._slots][None, :, None]
        return table[self.longest - 1 : self.longest, None, None]

    def rotated(self, x: Tensor) -> Tensor:
        """Apply the rotary embedding to queries or keys ``[S, B, heads, D]``.

        The dtype and the rounding are Megatron's.
        """
        cos, sin = (part.to(x.dtype) for part in self._cos_sin)
        return x * cos + self._quarter_turn(x) * sin

    def _quarter_turn(self, x: Tensor) -> Tensor:
        if self._rotation.interleaved:
            return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        low, high = x.chunk(2, dim=-1)
        return torch.cat((-high, low), dim=-1)

    def extended(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys and values of a layer and return all of them, ``[B, groups, T, D]`` each.

        Args:
            layer: any number that tells the layers of a rank apart.
            key, value: ``[S, B, groups, D]``. Keys are rotated.
        """
        if layer not in self._layers:
            _, batch, groups, channels = key.shape
            shape = (batch, groups, self.max_length, channels)
            # Zeros, since attention reads places that a row has not reached before it masks them.
            self._layers[layer] = key.new_zeros(shape), value.new_zeros(shape)
        for whole, new in zip(self._layers[layer], (key, value), strict=True):
            new = new.permute(1, 2, 0, 3)
            if self._is_ragged and not self.is_prompt:
                whole[torch.arange(len(new), device=new.device), :, self._slots] = new[:, :, 0]
            else:
                whole[:, :, self.longest - new.size(2) : self.longest] = new
        key, value = self._layers[layer]
        return key[:, :, : self.longest], value[:, :, : self.longest]

    @property
    def mask(self) -> Tensor | None:
        """bool ``[B, 1, 1, T]``, true where a row's new token may attend. None if it may attend everywhere."""
        return self._mask


class CachedAttention(torch.nn.Module):
    """A replacement of a layer's core attention while sequences are decoded. ``cache`` is set before each pass."""

    def __init__(self, layer: int, softmax_scale: float | None) -> None:
        super().__init__()
        self.layer, self.softmax_scale = layer, softmax_scale
        self.cache: KVCache | None = None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_unused, **_unused_too) -> Tensor:
        """Return the attention of the new tokens to themselves and to all earlier ones.

        Args:
            query: ``[S, B, heads, D]``, without rotary embedding.
            key, value: ``[S, B, groups, D]``.

        Returns:
            ``[S, B, heads * D]``.
        """
        cache = self.cache
        query, key = cache.rotated(query), cache.rotated(key)
        keys, values = cache.extended(self.layer, key, value)
        attend = self._within_prompts if cache.is_prompt else self._to_the_past
        return attend(query, keys, values)

    def _within_prompts(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        # The padding of shorter rows comes after them, where the causal mask hides it.
        query = query.permute(1, 2, 0, 3)
        is_grouped = query.size(1) != keys.size(1)
        context = scaled_dot_product_attention(
            query, keys, values, is_causal=True, scale=self.softmax_scale, enable_gqa=is_grouped
        )
        return context.permute(2, 0, 1, 3).flatten(2)

    def _to_the_past(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        # The heads of a query group become its queries, so that keys and values are not repeated.
        _, batch, heads, channels = query.shape
        grouped = query.view(batch, keys.size(1), heads // keys.size(1), channels)
        context = scaled_dot_product_attention(
            grouped, keys, values, attn_mask=self.cache.mask, scale=self.softmax_scale
        )
        return context.reshape(1, batch, heads * channels)


class Decoder:
    """A model that is fed tokens and returns the logits of the next visual token. :func:`decoding` makes one.

    Args:
        chunks: this rank's, of :func:`megatron_cca.models.gpt.build_gpt`. Any TP x PP x VPP, with or without wrappers.
        vocabulary: the model's.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], vocabulary: ImageVocabulary) -> None:
        self._gpts = [unwrapped_gpt(chunk) for chunk in chunks]
        self._vocabulary = vocabulary
        self._attentions: list[CachedAttention] = []
        self._rotation: Rotation | None = None

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank has the LM head, and so the logits."""
        return self._gpts[-1].post_process

    def new_cache(self, max_length: int) -> KVCache:
        """Return an empty cache for rows of at most ``max_length`` tokens."""
        if self._rotation is None or len(self._rotation.cos) < max_length:
            self._rotation = rotation_of(self._gpts[0], max_length, platform.device())
        return KVCache(max_length, self._rotation)

    @torch.no_grad()
    def feed(self, cache: KVCache, tokens: Tensor, counts: Tensor | None = None) -> Tensor | None:
        """Feed tokens and return the logits that follow the last one. Collective over the model-parallel ranks.

        Args:
            cache: of these sequences, from :meth:`new_cache`. Every call adds to it.
            tokens: int64 ``[B, S]``. At first the prompts, padded on the right. After them one token per row.
            counts: int64 ``[B]``, how many of a row's tokens are its prompt. None means all.

        Returns:
            On the last pipeline stage the logits of the visual tokens, float32 ``[B, codebook_size]``. None on others.
        """
        cache.begin(tokens, counts)
        for attention in self._attentions:
            attention.cache = cache
        last = tokens.new_full((len(tokens),), tokens.size(1) - 1) if counts is None else counts - 1
        output = None
        for gpt in self._gpts:
            if not gpt.pre_process:
                gpt.set_input_tensor(_received(gpt, tokens))
            output = _run(gpt, tokens, last, self._vocabulary)
            if not gpt.post_process:
                _send(output)
        return output if self.is_last_stage else None


@contextmanager
def decoding(chunks: Sequence[torch.nn.Module], vocabulary: ImageVocabulary) -> Iterator[Decoder]:
    """Prepare model chunks for decoding, and restore them at the end of the block.

    Afterwards they are as they were before, in training or in evaluation mode. Context parallelism is not supported,
    since its ranks hold parts of a sequence only.
    """
    assert parallel_state.get_context_parallel_world_size() == 1
    decoder = Decoder(chunks, vocabulary)
    with ExitStack() as stack:
        for gpt in decoder._gpts:
            decoder._attentions += stack.enter_context(fed_token_by_token(gpt, CachedAttention))
        yield decoder


def _run(gpt: GPTModel, tokens: Tensor, last: Tensor, vocabulary: ImageVocabulary) -> Tensor:
    if gpt.pre_process:
        positions = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
    else:
        tokens = positions = None
    context = {"last": last, "vocabulary": vocabulary}
    return gpt(tokens, positions, None, output_processor=_visual_logits, output_processor_context=context)


def _visual_logits(*, hidden_states: Tensor, output_layer, context: dict, **_unused) -> Tensor:
    """Return the logits of the visual tokens alone. Nothing else can be drawn, and they are a fifth of Emu3's."""
    last, vocabulary = context["last"], context["vocabulary"]
    return visual_logits(hidden_states[last, torch.arange(len(last), device=last.device)], output_layer, vocabulary)


def visual_logits(hidden: Tensor, output_layer: torch.nn.Module, vocabulary: ImageVocabulary) -> Tensor:
    """Return the logits of the visual tokens alone, float32 ``[N, codebook_size]``, of hidden states ``[N, H]``.

    Collective over the tensor-parallel ranks.
    """
    group, weight, bias = parallel_state.get_tensor_model_parallel_group(), output_layer.weight, output_layer.bias
    first = group.rank() * weight.size(0) - vocabulary.visual_start
    low, high = max(0, first), min(vocabulary.codebook_size, first + weight.size(0))
    logits = hidden.new_zeros(len(hidden), vocabulary.codebook_size, dtype=torch.float32)
    if low < high:
        own = slice(low - first, high - first)
        logits[:, low:high] = linear(hidden, weight[own], None if bias is None else bias[own])
    if group.size() > 1:
        dist.all_reduce(logits, group=group)
    return logits


def _received(gpt: GPTModel, tokens: Tensor) -> Tensor:
    hidden = torch.empty(
        (tokens.size(1), tokens.size(0), gpt.config.hidden_size), dtype=gpt.config.params_dtype, device=tokens.device
    )
    source = parallel_state.get_pipeline_model_parallel_prev_rank()
    dist.recv(hidden, source, group=parallel_state.get_pipeline_model_parallel_group())
    return hidden


def _send(hidden: Tensor) -> None:
    target = parallel_state.get_pipeline_model_parallel_next_rank()
    dist.send(hidden.contiguous(), target, group=parallel_state.get_pipeline_model_parallel_group())
