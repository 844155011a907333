"""A Megatron checkpoint read under the names that other programs have for its tensors, and an export's template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from megatron_cca.checkpoint import layout
from megatron_cca.checkpoint.huggingface.huggingface_checkpoint import (
    check_dtype,
    companion_files,
    read_config,
    recognise,
)
from megatron_cca.checkpoint.integrity import check_whole
from megatron_cca.checkpoint.stored_tensors import StoredTensors
from megatron_cca.checkpoint.summary import saved_config
from megatron_cca.config import LoraConfig
from megatron_cca.errors import UserError, error_context
from megatron_cca.models import family_of, resolve_architecture
from megatron_cca.models.formats import HuggingFaceFormat, Json
from megatron_cca.models.naming import recognise_naming
from megatron_cca.models.weight_files import CONFIG
from megatron_cca.models.weight_map import (
    LINEAR_IN,
    LINEAR_OUT,
    RowsInMegatron,
    merged_weight,
    rows_in_megatron,
    scale_of,
)
from megatron_cca.models.weights_folder import PickledFolder, SafetensorsFolder, WeightsFolder, open_weights


class MegatronCheckpoint:
    """A whole checkpoint, imported or trained, of any layout.

    Attributes:
        folder: the checkpoint's own folder.
        config: the configuration in its summary.
        architecture: the resolved sizes of its model.
        format: the family's format on Hugging Face, or that of its authors' own files.
        stored: tensors by Megatron's names. Adapters of a LoRA run are merged into the weights.
        shapes: shape of every Hugging Face tensor of the decoder, by the weight map's name.
        row_shapes: the same as rows, ``[rows, columns]`` or ``[rows]``.
        dtype: dtype of all these tensors.

    Raises:
        UserError: the checkpoint is not whole, a tensor does not fit the checkpoint's sizes, or the family's files
            have no place for the model's attention. Names the file, tensor or key.
    """

    def __init__(self, path: str | Path, option: str) -> None:
        self.option = option
        self.folder = layout.resolve(path, option)
        check_whole(self.folder, option)
        self.config = saved_config(self.folder, option)
        self.architecture = resolve_architecture(self.config.model)
        family = family_of(self.config.model)
        self.format = family.huggingface or family.weights_file
        with error_context(f"{option}: {self.folder}"):
            self.format.weights.check_attention(self.architecture)
        self.shapes = self.format.weights.huggingface_shapes(self.architecture)
        self.row_shapes = self.format.weights.row_shapes(self.architecture)
        self.stored = self._open()
        self._tensors = self.format.weights.tensors(self.architecture)
        self._rows: Mapping[str, list[RowsInMegatron]] = rows_in_megatron(self._tensors)
        self.dtype = self._checked_dtype()

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows ``start .. stop`` of the Hugging Face tensor that the weight map calls ``name``."""
        parts = []
        for rows in self._rows[name]:
            low, high = max(start, rows.start), min(stop, rows.start + rows.count)
            if low < high:
                shift = rows.megatron_start - rows.start
                parts.append(self.stored.read(rows.tensor.key, rows.tensor.layer, low + shift, high + shift))
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
        with error_context(f"{self.option}: {self.folder}"):
            check_dtype(dtype)
        return dtype


class MergedTensors(StoredTensors):
    """The tensors of one checkpoint folder, with merged adapters. A block has the same bits as in the whole tensor.

    Raises:
        UserError: see :class:`StoredTensors`; also if an adapter is missing or has another shape. Names the tensor.
    """

    def __init__(self, folder: Path, key: str, settings: LoraConfig) -> None:
        super().__init__(folder, key)
        self._settings = settings
        self._adapted = tuple(f".{name}.weight" for name in settings.target_modules)
        self._last: tuple[tuple[str, int], tuple[Tensor, Tensor]] | None = None
        for weight in [name for name in self.names() if name.endswith(self._adapted)]:
            self._check(weight)

    def read_block(self, key: str, low: Sequence[int], high: Sequence[int]) -> Tensor:
        """Return a block, see :meth:`StoredTensors.read_block`. A block of a projection must lie in one layer."""
        if not key.endswith(self._adapted):
            return super().read_block(key, low, high)
        assert high[0] == low[0] + 1, "layers have adapters of their own"
        linear_in, linear_out = self._adapter(key, low[0])
        (weight,) = super().read_block(key, low, high)
        linear_in, linear_out = linear_in[:, low[2] : high[2]], linear_out[low[1] : high[1]]
        return merged_weight(weight, linear_in, linear_out, scale_of(self._settings))[None]

    def _adapter(self, weight: str, layer: int) -> tuple[Tensor, Tensor]:
        """Return A and B of one layer. The last answer is kept for the next rows of the same weight."""
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


@dataclass(frozen=True)
class ExportTemplate:
    """Configuration, files and tensors to copy into an export.

    Attributes:
        option: the option that messages name.
        config: contents of ``config.json``. None if there is none.
        config_file: path of ``config.json``.
        files: all other files to copy.
        tensors: the folder that holds the tensors to copy.
        names: names in ``tensors``, by the names without prefix.
    """

    option: str
    config: Json | None = None
    config_file: Path | None = None
    files: tuple[Path, ...] = ()
    tensors: WeightsFolder | None = None
    names: Mapping[str, str] = field(default_factory=dict)


def template_from_folder(folder: Path, format: HuggingFaceFormat, option: str) -> ExportTemplate:
    """Return the template from a Hugging Face folder of the same family.

    Only its tensors outside of the decoder are used. The folder may have no weights at all.

    Raises:
        UserError: the folder or its configuration is of another family, or a file is damaged.
    """
    config = read_config(folder, option)
    if recognise(config, folder, option) is not format:
        raise UserError(f"{option}: {folder} is of another family than the checkpoint")
    tensors, names = None, {}
    if SafetensorsFolder.is_in(folder) or PickledFolder.is_in(folder):
        tensors = open_weights(folder, option)
        naming = recognise_naming(format.namings, tensors.tensors)
        names = {bare: name for name in tensors.tensors if (bare := naming.companion(name)) is not None}
    return _template(option, folder, config, tensors, names)


def template_from_checkpoint(checkpoint: Path, option: str) -> ExportTemplate:
    """Return the template that the import left in a checkpoint, also after training. Empty if there is none."""
    folder, parts = checkpoint / layout.COMPANION_FILES, checkpoint / layout.COMPANION_TENSORS
    if not (folder / CONFIG).is_file():
        return ExportTemplate(option)
    tensors = SafetensorsFolder(parts, option) if parts.is_dir() else None
    names = {name: name for name in tensors.tensors} if tensors else {}
    return _template(option, folder, read_config(folder, option), tensors, names)


def _template(
    option: str, folder: Path, config: Json, tensors: WeightsFolder | None, names: Mapping[str, str]
) -> ExportTemplate:
    format = recognise(config, folder, option)
    with error_context(f"{option}: {folder / CONFIG}"):
        format.read_model_config(config)
    files = tuple(path for path in companion_files(folder) if path.name != CONFIG)
    return ExportTemplate(option, config, folder / CONFIG, files, tensors, names)


def _adapter_of(weight: str) -> tuple[str, str]:
    projection = weight.removesuffix("weight")
    return f"{projection}{LINEAR_IN}", f"{projection}{LINEAR_OUT}"
