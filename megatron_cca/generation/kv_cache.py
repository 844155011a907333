"""The keys and values of sequences that are being decoded, and the attention that reads them.

Megatron's static inference context stores keys without their rotation and rotates all of them again for every token. It
also takes a token's index in the batch for its position. Here keys are rotated once, and each row has its own
positions. Prompts of different lengths can therefore be decoded together.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_cca.models.rotary_2d import Rotation


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
