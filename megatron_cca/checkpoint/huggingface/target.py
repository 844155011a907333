"""A Megatron checkpoint for other programs: with Hugging Face names, or as a weights file of a family's authors."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from megatron_cca.checkpoint import layout
from megatron_cca.checkpoint.huggingface.safetensors_files import INDEX, SINGLE, SafetensorsFolder
from megatron_cca.checkpoint.huggingface.source import (
    AS_IT_IS,
    CONFIG,
    HuggingFaceCheckpoint,
    Reading,
    check_dtype,
    companion_files,
    one_dtype,
    read_config,
    recognise,
)
from megatron_cca.checkpoint.integrity import check_whole
from megatron_cca.checkpoint.stored_tensors import ByteProgress, StoredTensors
from megatron_cca.checkpoint.summary import saved_config
from megatron_cca.config import LoraConfig
from megatron_cca.config.load import config_from_dict
from megatron_cca.errors import UserError, error_context
from megatron_cca.io.output_folders import check_file, check_space
from megatron_cca.io.outputs import OPTION, file_system_errors, whole_file
from megatron_cca.models import FAMILIES, family_of, resolve_architecture
from megatron_cca.models.formats import HuggingFaceFormat, Json, Naming, WeightsFileFormat, recognise_naming
from megatron_cca.models.weight_files import (
    SAFETENSORS,
    chosen_set,
    contents_of,
    is_recomputed,
    same_tensors,
    sets_in,
    tensors_under,
)
from megatron_cca.models.weight_map import LINEAR_IN, LINEAR_OUT, merged_weight, scale_of, sources


class MegatronCheckpoint:
    """A whole checkpoint, imported or trained, of any layout.

    Attributes:
        folder: the checkpoint's own folder.
        config: the configuration in its summary.
        architecture: the resolved sizes of its model.
        format: the family's format on Hugging Face, or that of its authors' own files.
        stored: tensors by Megatron's names. Adapters of a LoRA run are merged into the weights.
        shapes: shape of every Hugging Face tensor of the decoder, by the weight map's name.
        dtype: dtype of all these tensors.

    Raises:
        UserError: the checkpoint is not whole, or a tensor does not fit the checkpoint's sizes. Names the file or
            tensor.
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
        """Return rows ``start .. stop`` of the Hugging Face tensor that the weight map calls ``name``."""
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


def _adapter_of(weight: str) -> tuple[str, str]:
    projection = weight.removesuffix("weight")
    return f"{projection}{LINEAR_IN}", f"{projection}{LINEAR_OUT}"


@dataclass(frozen=True)
class Template:
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
    tensors: SafetensorsFolder | None = None
    names: Mapping[str, str] = field(default_factory=dict)


def template_from_folder(folder: Path, format: HuggingFaceFormat, option: str) -> Template:
    """Return the template from a Hugging Face folder of the same family.

    Only its tensors outside of the decoder are used. The folder may have no safetensors at all.

    Raises:
        UserError: the folder or its configuration is of another family, or a file is damaged.
    """
    config = read_config(folder, option)
    if recognise(config, folder, option) is not format:
        raise UserError(f"{option}: {folder} is of another family than the checkpoint")
    tensors, names = None, {}
    if (folder / SINGLE).is_file() or (folder / INDEX).is_file():
        tensors = SafetensorsFolder(folder, option)
        naming = recognise_naming(format.namings, tensors.tensors)
        names = {bare: name for name in tensors.tensors if (bare := naming.companion(name)) is not None}
    return _template(option, folder, config, tensors, names)


def template_from_checkpoint(checkpoint: Path, option: str) -> Template:
    """Return the template that the import left in a checkpoint, also after training. Empty if there is none."""
    folder, parts = checkpoint / layout.COMPANION_FILES, checkpoint / layout.COMPANION_TENSORS
    if not (folder / CONFIG).is_file():
        return Template(option)
    tensors = SafetensorsFolder(parts, option) if parts.is_dir() else None
    names = {name: name for name in tensors.tensors} if tensors else {}
    return _template(option, folder, read_config(folder, option), tensors, names)


def _template(
    option: str, folder: Path, config: Json, tensors: SafetensorsFolder | None, names: Mapping[str, str]
) -> Template:
    format = recognise(config, folder, option)
    with error_context(f"{option}: {folder / CONFIG}"):
        format.read_model_config(config)
    files = tuple(path for path in companion_files(folder) if path.name != CONFIG)
    return Template(option, config, folder / CONFIG, files, tensors, names)


SUFFIXES = (".pt", ".pth")
READABLE = (*SUFFIXES, SAFETENSORS)


class WeightsFile:
    """A weights file of a known family.

    Attributes:
        folder: path of the file. It has this name so that folder and file have the same interface.
        format, form, naming, model, architecture, dtype, companions: as in :class:`HuggingFaceCheckpoint`.

    Raises:
        UserError: the file is damaged, the family or a size is not known, there are several sets of weights, tensors
            are missing, unexpected or of another shape, or dtypes are mixed or not supported. Names the file and the
            tensor.
    """

    form = "a file of its authors"
    naming = Naming("file", {"": ""})

    def __init__(self, path: Path, option: str, reading: Reading = AS_IT_IS) -> None:
        self.folder, self.option, self.companions = path, option, {}
        with error_context(f"{option}: {path}"):
            # Check types and ranges of the given sizes as keys of a configuration.
            config_from_dict({"model": dict(reading.sizes)})
            self.format, found = _recognised(path, reading.section)
            shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
            self.model = self.format.read_model_config(shapes, reading.sizes, reading.assumed)
            self.architecture = resolve_architecture(self.model)
            self._tensors = {name: tensor for name, tensor in found.items() if not is_recomputed(name)}
            self._check_shapes()
            dtypes = {name: tensor.dtype for name, tensor in self._tensors.items()}
            self.dtype = one_dtype(dtypes, reading.dtype)

    precision = HuggingFaceCheckpoint.precision

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows ``start .. stop`` of a tensor, in :attr:`dtype`. ``name`` is from the weight map."""
        return self._tensors[name][start:stop].to(self.dtype).contiguous()

    def companion_files(self) -> list[Path]:
        """Return no files. A file has none beside it."""
        return []

    def _check_shapes(self) -> None:
        wanted = self.format.weights.huggingface_shapes(self.architecture)
        for name in sorted(wanted.keys() - self._tensors.keys()):
            raise UserError(f"tensor {name} is missing")
        for name in sorted(self._tensors.keys() - wanted.keys()):
            raise UserError(f"tensor {name} belongs to no {self.model.name}")
        for name, shape in wanted.items():
            if tuple(self._tensors[name].shape) != shape:
                found = list(self._tensors[name].shape)
                raise UserError(f"tensor {name} has shape {found}, {self.model.name} has {list(shape)}")


def _recognised(path: Path, section: str | None) -> tuple[WeightsFileFormat, dict[str, Tensor]]:
    formats = {name: family.weights_file for name, family in FAMILIES.items() if family.weights_file}
    content, size = contents_of(path), path.stat().st_size
    for one in formats.values():
        sets = [found for found in sets_in(content, (one.marker,), size) if one.knows(found.weights)]
        if not sets:
            continue
        chosen = chosen_set(sets, section, are_alike=len(sets) > 1 and section is None and same_tensors(sets))
        if section is None and chosen.beside:
            raise UserError(
                f"tensor {chosen.beside[0]} is none of the weights under {chosen.place!r}; --section {chosen.place} "
                "takes those alone"
            )
        return one, chosen.weights
    sections = tuple(dict.fromkeys(section for one in formats.values() for section in one.sections))
    found = tensors_under(content, sections, size)
    raise UserError(f"is of no family known here ({', '.join(formats)}); it {_looks_like(found)}")


def _looks_like(found: Collection[str]) -> str:
    if not found:
        return "holds no tensors"
    if "quantize.embedding.weight" in found:
        return "looks like an image tokenizer, which is given as --image-tokenizer"
    if any(name.endswith("self_attn.q_proj.weight") for name in found):
        return "looks like a decoder as transformers names it; give its folder with config.json and safetensors"
    return f"holds {len(found)} tensors such as {next(iter(found))}"


def export_weights_file(source: MegatronCheckpoint, output: Path, *, overwrite: bool, progress_bar: bool) -> Path:
    """Write a checkpoint as a file that the programs of the family's authors load. The file is whole or does not exist.

    All weights are in memory during the export.

    Raises:
        UserError: the name does not end in .pt or .pth, the file exists, the disk is full, or another error of the
            file system.
    """
    if output.suffix not in SUFFIXES:
        raise UserError(f"{OPTION}: {output}: this family's weights are one file; give a name that ends in .pt")
    check_file(output, overwrite=overwrite)
    total = source.dtype.itemsize * sum(map(math.prod, source.shapes.values()))
    with file_system_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        check_space(output.parent, total)
        with whole_file(output) as partial:
            _save({source.format.sections[0]: _state(source, total, progress_bar)}, partial)
    return output


def _save(contents: dict[str, dict[str, Tensor]], path: Path) -> None:
    try:
        # Given a path instead of an open file, torch.save hides the error of the file system.
        with path.open("wb") as file:
            torch.save(contents, file)
    except RuntimeError as error:
        # torch reports a failed write only as a file that is too short.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _state(source: MegatronCheckpoint, total_bytes: int, progress_bar: bool) -> dict[str, Tensor]:
    with ByteProgress("exporting", total_bytes, shown=progress_bar) as progress:
        read = (source.read(name, 0, shape[0]).contiguous() for name, shape in source.shapes.items())
        return dict(zip(source.shapes, progress.watch(read), strict=True))
