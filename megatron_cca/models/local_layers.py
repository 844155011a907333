"""Layers that replace Megatron-Core's or Transformer Engine's, which do not suit sequences as long as images."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_cca.platform.operations import current_operations


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm for sequence parallelism, which Megatron's torch fallback does not support.

    ``[..., H] -> [..., H]``, in the input's dtype. The weight is marked ``sequence_parallel``, so that Megatron sums
    its gradient over the tensor-parallel group.
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **_unused) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` over the last dimension."""
        return current_operations().rms_norm(x, self.weight, self.eps)


class ScaledDotProductAttention(torch.nn.Module):
    """Core attention with torch's fused kernels. With a flash kernel, no S x S score matrix is ever in memory.

    Under context parallelism, each rank gathers the keys and values of all ranks (as in Llama 3, arXiv 2407.21783,
    section 3.3.2). Its queries are its own two pieces of the sequence.
    """

    def __init__(
        self,
        config,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **_unused,
    ) -> None:
        super().__init__()
        assert attention_type == "self"
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale
        self.context_parallel_size = config.context_parallel_size

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        **_unused,
    ) -> Tensor:
        """Compute causal attention, or attention of one new token to the whole cache.

        Args:
            query: ``[S, B, heads, D]``. Under context parallelism, S is the length of this rank's part.
            key: ``[T, B, groups, D]``.
            value: ``[T, B, groups, D]``.
            attention_mask: unused. Padding is on the right, where the causal mask hides it.
            attn_mask_type: ``no_mask`` for decoding with a cache, else causal.

        Returns:
            ``[S, B, heads * D]``.
        """
        causal = attn_mask_type != AttnMaskType.no_mask
        assert causal or query.size(0) == 1, "without a mask only a single new token may attend to the cache"
        if self.context_parallel_size > 1:
            return self._over_context_ranks(query, key, value)
        return self._attend(query, key, value, is_causal=causal)

    def _over_context_ranks(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        group = parallel_state.get_context_parallel_group()
        key, value = (_whole_sequence(tensor, group) for tensor in (key, value))
        rank, pieces = group.rank(), 2 * group.size()
        outputs = []
        for piece, own in zip((rank, pieces - 1 - rank), query.chunk(2), strict=True):
            seen = own.size(0) * (piece + 1)
            mask = current_operations().causal_mask(own.size(0), seen)
            outputs.append(self._attend(own, key[:seen], value[:seen], attn_mask=mask))
        return torch.cat(outputs)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, **mask) -> Tensor:
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        if query.is_cuda and query.dtype == torch.float32:
            # The only fused kernel for fp32 does not support grouped queries.
            key, value = (tensor.repeat_interleave(query.size(1) // key.size(1), 1) for tensor in (key, value))
        context = scaled_dot_product_attention(
            query,
            key,
            value,
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.softmax_scale,
            enable_gqa=query.size(1) != key.size(1),
            **mask,
        )
        return context.permute(2, 0, 1, 3).flatten(2)


def _whole_sequence(part: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """Gather the whole sequence ``[S, ...]``. Rank r has two pieces of it, number r and 2 * size - 1 - r."""
    gathered = gather_from_sequence_parallel_region(part, tensor_parallel_output_grad=True, group=group)
    pieces = gathered.chunk(2 * group.size())
    return torch.cat([*pieces[::2], *pieces[1::2][::-1]])
