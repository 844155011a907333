"""Rotary positions on the square grid of an image (``rope_2d``), as defined by the model of arXiv 2406.06525.

Two neighbouring channels of a head are a pair. The first half of the pairs rotates with the row of a code, the second
half with its column. Tokens before the image have no place on the grid. Their cosine and sine are both 0, so that their
queries and keys are zero. No rotation angle gives zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch.nn.functional import pad

from megatron_cca.megatron_compat.decoding import mix_in
from megatron_cca.models.architecture import Architecture, grid_side


class GridRotaryEmbedding(RotaryEmbedding):
    """Megatron's rotary embedding, with the angles of a grid.

    Args:
        channels: number of channels of a head, a multiple of 4.
        base: base of the frequencies. Each axis has the frequencies of half a head.
        side: side of the grid.
        prefix_tokens: number of tokens before the grid. Their angles have no meaning.
        use_cpu_initialization: as in Megatron.
    """

    def __init__(
        self, channels: int, base: float, *, side: int, prefix_tokens: int, use_cpu_initialization: bool
    ) -> None:
        super().__init__(
            channels // 2,
            rotary_percent=1.0,
            rotary_interleaved=True,
            rotary_base=base,
            use_cpu_initialization=use_cpu_initialization,
        )
        self.side, self.prefix_tokens = side, prefix_tokens

    def get_emb(self, max_seq_len: int, offset: int = 0) -> Tensor:
        """Return the angle of each position and channel, float32 ``[max_seq_len, 1, 1, channels]``.

        Padding after the image gets angles of further rows of the grid. No token attends to it.
        """
        axis = super().get_emb(max(self.side, (offset + max_seq_len) // self.side + 1))
        places = torch.arange(offset, offset + max_seq_len, device=axis.device).sub_(self.prefix_tokens).clamp_(min=0)
        return torch.cat([axis[places // self.side], axis[places % self.side]], dim=-1)


def use_grid_positions(gpt: GPTModel, architecture: Architecture) -> None:
    """Replace the positions of a model built with ``rope`` and ``rotary_interleaved`` by those of ``rope_2d``."""
    gpt.rotary_pos_emb = GridRotaryEmbedding(
        gpt.config.kv_channels,
        architecture.rotary_base,
        side=grid_side(architecture),
        prefix_tokens=architecture.prefix_tokens,
        use_cpu_initialization=gpt.config.use_cpu_initialization,
    )
    context = parallel_state.get_context_parallel_group()
    # Context parallelism deals out a sequence in zigzag order. Rank 0 has the beginning.
    if architecture.prefix_tokens == 0 or context.rank() > 0:
        return
    zero_prefix = _PrefixZeroing(architecture.prefix_tokens, pieces=2 if context.size() > 1 else 1)
    for layer in gpt.decoder.layers:
        # Do this in the core attention, of any class. There, queries and keys are rotated, and every rank has the
        # sequence in order again. Activation recompute runs it again.
        attention = layer.self_attention.core_attention
        attention.zero_prefix = zero_prefix
        mix_in(attention, _WithZeroPrefix)


@dataclass(frozen=True)
class Rotation:
    """The rotation of queries and keys.

    Attributes:
        cos, sin: float32 ``[positions, D]``. Both are 0 at positions whose queries and keys must be zero.
        interleaved: whether the two channels of a pair are neighbours. Otherwise they are half a head apart.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool


def rotation_of(gpt: GPTModel, positions: int, device: torch.device) -> Rotation:
    """Return the rotation that a model applies to the first positions of a row."""
    angles = gpt.rotary_pos_emb.get_emb(positions)[:, 0, 0].to(device)
    cos, sin = torch.cos(angles), torch.sin(angles)
    blank = getattr(gpt.rotary_pos_emb, "prefix_tokens", 0)
    cos[:blank], sin[:blank] = 0, 0
    return Rotation(cos, sin, gpt.config.rotary_interleaved)


@dataclass(frozen=True)
class _PrefixZeroing:
    """A function that sets the queries or keys ``[S, B, heads, D]`` of the first tokens to zero."""

    prefix_tokens: int
    pieces: int

    def __call__(self, x: Tensor) -> Tensor:
        assert self.prefix_tokens <= x.size(0) // self.pieces, "the prefix does not fit a rank's part of a row"
        # This cannot be in place: with selective recomputation, x is a leaf.
        return pad(x[self.prefix_tokens :], (*(0, 0) * 3, self.prefix_tokens, 0))


class _WithZeroPrefix:
    """Mixin for the class of a core attention."""

    def forward(self, query: Tensor, key: Tensor, *others, **more) -> Tensor:
        return super().forward(self.zero_prefix(query), self.zero_prefix(key), *others, **more)
