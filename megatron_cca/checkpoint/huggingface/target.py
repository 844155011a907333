"""A Megatron checkpoint seen through its family's weight map: its rows under Hugging Face's names."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megatron_cca.checkpoint import layout
from megatron_cca.checkpoint.huggingface.adapters import MergedTensors
from megatron_cca.checkpoint.huggingface.widths import check_dtype
from megatron_cca.checkpoint.integrity import check_whole
from megatron_cca.checkpoint.stored_tensors import StoredTensors
from megatron_cca.checkpoint.summary import saved_config
from megatron_cca.errors import UserError, said_of
from megatron_cca.models import family_of, resolve_architecture
from megatron_cca.models.weight_map import sources


class MegatronCheckpoint:
    """A whole checkpoint, imported or trained, on whatever layout.

    Attributes:
        folder, config, architecture: where and what it is.
        format: of its family on Hugging Face, or in its authors' own files.
        stored: its tensors as Megatron names them, a LoRA run's adapters merged into them.
        shapes: of every Hugging Face tensor of the decoder, by the weight map's name.
        dtype: of all of them.

    Raises:
        UserError: no whole checkpoint, or tensors that do not fit its own sizes; names the file or tensor.
    """

    def __init__(self, path: str | Path, option: str) -> None:
        self.option = option
        self.folder = layout.resolve(path, option)
        check_whole(self.folder, option)
        self.config = saved_config(self.folder, option)
        self.architecture = resolve_architecture(self.config.model)
        family = family_of(self.config.model)
        self.format = family.huggingface or family.weights_file
        self.shapes = self.format.weights.huggingface_shapes(self.architecture)
        self.stored = self._open()
        self._tensors = self.format.weights.tensors(self.architecture)
        self._sources = sources(self._tensors)
        self.dtype = self._checked_dtype()

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start .. stop`` of the Hugging Face tensor that the weight map calls ``name``."""
        parts = []
        for source in self._sources[name]:
            low, high = max(start, source.start), min(stop, source.start + source.count)
            if low < high:
                shift = source.megatron_start - source.start
                parts.append(self.stored.read(source.tensor.key, source.tensor.layer, low + shift, high + shift))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _open(self) -> StoredTensors:
        if self.config.lora.dim is None:
            return StoredTensors(self.folder, self.option)
        return MergedTensors(self.folder, self.option, self.config.lora)

    def _checked_dtype(self) -> torch.dtype:
        first = self._tensors[0].key
        for tensor in self._tensors:
            if tensor.key not in self.stored:
                raise UserError(f"{self.option}: {self.folder} lacks tensor {tensor.key}; choose another checkpoint")
            found, rows = self.stored.shape(tensor.key), (tensor.num_rows,)
            if tensor.layer is not None:
                rows = (self.architecture.num_layers, *rows)
            wanted = (*rows, tensor.columns) if tensor.columns is not None else rows
            fits = found == wanted or (tensor.padded and found[0] >= wanted[0] and found[1:] == wanted[1:])
            if not fits:
                raise UserError(
                    f"{self.option}: tensor {tensor.key} in {self.folder} has shape {list(found)}, its sizes want "
                    f"{list(wanted)}"
                )
            if self.stored.dtype(tensor.key) != self.stored.dtype(first):
                raise UserError(f"{self.option}: tensor {tensor.key} in {self.folder} has another dtype than {first}")
        dtype = self.stored.dtype(first)
        with said_of(f"{self.option}: {self.folder}"):
            check_dtype(dtype)
        return dtype
