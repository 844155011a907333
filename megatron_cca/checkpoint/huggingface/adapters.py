"""A LoRA run's checkpoint read as if its adapters had been merged into the weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from megatron_cca.checkpoint.stored_tensors import StoredTensors
from megatron_cca.config import LoraConfig
from megatron_cca.errors import UserError
from megatron_cca.models.low_rank import LINEAR_IN, LINEAR_OUT, merged_weight, scale_of


class MergedTensors(StoredTensors):
    """The tensors of one checkpoint folder, their adapters merged in; each block is rounded as the whole would be.

    Raises:
        UserError: see :class:`StoredTensors`; adapters missing or misshapen, names the tensor.
    """

    def __init__(self, folder: Path, key: str, settings: LoraConfig) -> None:
        super().__init__(folder, key)
        self._settings = settings
        self._adapted = tuple(f".{name}.weight" for name in settings.target_modules)
        self._last: tuple[tuple[str, int], tuple[Tensor, Tensor]] | None = None
        for weight in [name for name in self.names() if name.endswith(self._adapted)]:
            self._check(weight)

    def read_block(self, key: str, low: Sequence[int], high: Sequence[int]) -> Tensor:
        """See :meth:`StoredTensors.read_block`; of a projection at most one layer at a time."""
        if not key.endswith(self._adapted):
            return super().read_block(key, low, high)
        assert high[0] == low[0] + 1, "layers have adapters of their own"
        linear_in, linear_out = self._adapter(key, low[0])
        (weight,) = super().read_block(key, low, high)
        linear_in, linear_out = linear_in[:, low[2] : high[2]], linear_out[low[1] : high[1]]
        return merged_weight(weight, linear_in, linear_out, scale_of(self._settings))[None]

    def _adapter(self, weight: str, layer: int) -> tuple[Tensor, Tensor]:
        """A and B of one layer, kept for the next rows of the same weight."""
        if self._last is None or self._last[0] != (weight, layer):
            parts = (self.read(name, layer, 0, self.shape(name)[1]) for name in _adapter_of(weight))
            self._last = (weight, layer), tuple(parts)
        return self._last[1]

    def _check(self, weight: str) -> None:
        layers, rows, columns = self.shape(weight)
        wanted = ((layers, self._settings.dim, columns), (layers, rows, self._settings.dim))
        for name, shape in zip(_adapter_of(weight), wanted, strict=True):
            if name not in self:
                raise UserError(f"{self.option}: {self.folder} lacks tensor {name}; choose another checkpoint")
            if self.shape(name) != shape:
                raise UserError(
                    f"{self.option}: tensor {name} in {self.folder} has shape {list(self.shape(name))}, its weight and "
                    f"lora.dim {self._settings.dim} want {list(shape)}"
                )


def _adapter_of(weight: str) -> tuple[str, str]:
    projection = weight.removesuffix("weight")
    return f"{projection}{LINEAR_IN}", f"{projection}{LINEAR_OUT}"
