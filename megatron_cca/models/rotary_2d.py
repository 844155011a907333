"""Rotary positions over the square grid of an image (``rope_2d``; the definition is that of arXiv 2406.06525's model).

The first half of a head's pairs of channels turns with the code's row, the second with its column; a pair are
neighbouring channels. Tokens before the image have no place on the grid: there cosine and sine are both 0, so that
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

from megatron_cca.megatron_compat.mixins import mix_in
from megatron_cca.models.architecture import Architecture, grid_side


class GridRotaryEmbedding(RotaryEmbedding):
    """Megatron's rotary embedding, with the angles of a grid.

    Args:
        channels: of a head, a multiple of 4.
        base: of the frequencies, which are those of half a head along each axis.
        side: of the grid.
        prefix_tokens: before it; their angles mean nothing.
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
        """The angle of each position and channel, float32 ``[max_seq_len, 1, 1, channels]``.

        What fills a row up behind the grid stands on further rows of it, where nothing looks.
        """
        axis = super().get_emb(max(self.side, (offset + max_seq_len) // self.side + 1))
        places = torch.arange(offset, offset + max_seq_len, device=axis.device).sub_(self.prefix_tokens).clamp_(min=0)
        return torch.cat([axis[places // self.side], axis[places % self.side]], dim=-1)


def use_grid_positions(gpt: GPTModel, architecture: Architecture) -> None:
    """Give a model built with ``rope`` and ``rotary_interleaved`` the positions of ``rope_2d`` instead."""
    gpt.rotary_pos_emb = GridRotaryEmbedding(
        gpt.config.kv_channels,
        architecture.rotary_base,
        side=grid_side(architecture),
        prefix_tokens=architecture.prefix_tokens,
        use_cpu_initialization=gpt.config.use_cpu_initialization,
    )
    context = parallel_state.get_context_parallel_group()
    # Of a sequence that is dealt out in zigzag order, rank 0 has the beginning.
    if architecture.prefix_tokens == 0 or context.rank() > 0:
        return
    blanking = _Blanking(architecture.prefix_tokens, pieces=2 if context.size() > 1 else 1)
    for layer in gpt.decoder.layers:
        # In the core attention, whichever it is: there queries and keys have been rotated, and every rank has the
        # sequence in order again. It runs once more where activations are recomputed.
        attention = layer.self_attention.core_attention
        attention.blanking = blanking
        mix_in(attention, _Blanked)


@dataclass(frozen=True)
class _Blanking:
    """Puts zeros for the queries or keys of the first tokens, ``[S, B, heads, D]``."""

    prefix_tokens: int
    pieces: int

    def __call__(self, x: Tensor) -> Tensor:
        assert self.prefix_tokens <= x.size(0) // self.pieces, "the prefix does not fit a rank's part of a row"
        # Not in place: selective recomputation hands in leaves.
        return pad(x[self.prefix_tokens :], (*(0, 0) * 3, self.prefix_tokens, 0))


class _Blanked:
    """Mixed into the class of a core attention."""

    def forward(self, query: Tensor, key: Tensor, *others, **more) -> Tensor:
        return super().forward(self.blanking(query), self.blanking(key), *others, **more)


@dataclass(frozen=True)
class Rotation:
    """What turns queries and keys.

    Attributes:
        cos, sin: float32 ``[positions, D]``, both 0 where queries and keys are to vanish.
        interleaved: whether a pair are neighbouring channels; else they are half a head apart.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool


def rotation_of(gpt: GPTModel, positions: int, device: torch.device) -> Rotation:
    """The rotation that a model gives the first positions of a row."""
    angles = gpt.rotary_pos_emb.get_emb(positions)[:, 0, 0].to(device)
    cos, sin = torch.cos(angles), torch.sin(angles)
    blank = getattr(gpt.rotary_pos_emb, "prefix_tokens", 0)
    cos[:blank], sin[:blank] = 0, 0
    return Rotation(cos, sin, gpt.config.rotary_interleaved)
