"""Autoregressive decoding with Megatron's layers over tensor- and pipeline-parallel ranks, one token at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch.nn.functional import linear

from megatron_cca import platform
from megatron_cca.generation.kv_cache import CachedAttention, KVCache
from megatron_cca.megatron_compat.decoding import fed_token_by_token
from megatron_cca.models.image_vocabulary import ImageVocabulary
from megatron_cca.models.rotary_2d import Rotation, rotation_of


class Decoder:
    """A model that is fed tokens and returns the logits of the next visual token. :func:`decoding` makes one.

    Args:
        chunks: this rank's, of :func:`megatron_cca.models.gpt.build_gpt`. Any TP x PP x VPP, with or without wrappers.
        vocabulary: the model's.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], vocabulary: ImageVocabulary) -> None:
        self._gpts = [_bare(chunk) for chunk in chunks]
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


def _bare(chunk: torch.nn.Module) -> GPTModel:
    return next(module for module in chunk.modules() if isinstance(module, GPTModel))


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
    hidden = hidden_states[last, torch.arange(len(last), device=last.device)]
    group, weight = parallel_state.get_tensor_model_parallel_group(), output_layer.weight
    first = group.rank() * weight.size(0) - vocabulary.visual_start
    low, high = max(0, first), min(vocabulary.codebook_size, first + weight.size(0))
    logits = hidden.new_zeros(len(hidden), vocabulary.codebook_size, dtype=torch.float32)
    if low < high:
        logits[:, low:high] = linear(hidden, weight[low - first : high - first])
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
