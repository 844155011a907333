"""A weights file of a family's authors: read it with the interface of :class:`HuggingFaceCheckpoint`, and write it."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from megatron_cca.checkpoint.huggingface.reading import AS_IT_IS, Reading, one_dtype
from megatron_cca.checkpoint.huggingface.source import HuggingFaceCheckpoint
from megatron_cca.checkpoint.huggingface.target import MegatronCheckpoint
from megatron_cca.checkpoint.pieces import ByteProgress
from megatron_cca.config.load import config_from_dict
from megatron_cca.errors import UserError, error_context
from megatron_cca.io.outputs import OPTION, check_file, check_space, file_system_errors, whole_file
from megatron_cca.models import FAMILIES, resolve_architecture
from megatron_cca.models.formats import Naming, WeightsFileFormat
from megatron_cca.models.torch_file import SAFETENSORS, contents_of, same_tensors, sets_in, tensors_under
from megatron_cca.models.weight_sets import chosen_set, is_recomputed

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
