"""A Hugging Face folder that has been recognised and checked: its configuration, its tensors under the map's names."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch import Tensor

from megatron_cca.checkpoint.huggingface.options import AS_IT_IS, Reading
from megatron_cca.checkpoint.huggingface.safetensors_files import SafetensorsFolder, TensorInfo, same_tensors
from megatron_cca.checkpoint.huggingface.widths import PRECISIONS, one_dtype
from megatron_cca.config import ModelConfig
from megatron_cca.errors import UserError, said_of
from megatron_cca.io.external_files import hub_blobs
from megatron_cca.models import FAMILIES, resolve_architecture
from megatron_cca.models.architecture import Architecture
from megatron_cca.models.huggingface_format import HuggingFaceFormat, Json, recognise_naming
from megatron_cca.models.rotary_frequencies import check_frequencies
from megatron_cca.models.weight_sets import chosen_set, is_recomputed, weight_sets

CONFIG = "config.json"

# What is not copied along: weights in any format, and their index.
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".onnx", ".gguf"}


class HuggingFaceCheckpoint:
    """A folder with ``config.json`` and safetensors of a known family, in either of its forms.

    Attributes:
        folder, config, format, form: what it is.
        model: its sizes as a ``model`` section; ``architecture``: the same, resolved.
        dtype: of all the decoder's tensors.
        companions: tensors beside the decoder, by the name that does not depend on the form.

    Raises:
        UserError: not of a known family, a size that Megatron cannot have, several sets of weights, missing, extra or
            misshapen tensors, mixed or unsuitable dtypes, damaged files; names the key, tensor or file.
    """

    def __init__(self, folder: Path, option: str, reading: Reading = AS_IT_IS) -> None:
        self.folder, self.option = folder, option
        self.config = read_config(folder, option)
        self.format = recognise(self.config, folder, option)
        self.form = self.format.form(self.config)
        self.model, self.architecture = self._sizes()
        self.files = SafetensorsFolder(folder, option)
        with said_of(f"{option}: {folder}"):
            self.files.tensors = self._own_tensors(reading.section)
        self.naming = recognise_naming(self.format.namings, self.files.tensors)
        self._check_form()
        self._check_tensors()
        self.companions = {
            bare: name for name in self.files.tensors if (bare := self.naming.companion(name)) is not None
        }
        self._check_companions()
        with said_of(f"{option}: {folder}"):
            self.dtype = self._one_dtype(reading)

    @property
    def precision(self) -> str:
        """``training.precision`` of the same width."""
        return PRECISIONS[self.dtype]

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a decoder's tensor under its name in the weight map."""
        return self.files.read(self.naming.on_disk(name), start, stop).to(self.dtype)

    def companion_files(self) -> list[Path]:
        """See :func:`companion_files`."""
        return companion_files(self.folder)

    def _own_tensors(self, section: str | None) -> dict[str, TensorInfo]:
        """The tensors by the names that this family's programs give them, those that are computed left out."""
        found = self.files.tensors
        markers = {naming.on_disk(self.format.marker) for naming in self.format.namings}
        sets = weight_sets(found, markers)
        if sets:
            are_alike = len(sets) > 1 and section is None and same_tensors(self.files, sets)
            chosen = chosen_set(sets, section, are_alike=are_alike)
            found = chosen.weights | {name: found[name] for name in chosen.beside if section is None}
        computed = {name: info for name, info in found.items() if is_recomputed(name)}
        for name, info in computed.items():
            if name.endswith("inv_freq"):
                check_frequencies(name, self.files.read_info(info), self.architecture)
        return {name: info for name, info in found.items() if name not in computed}

    def _sizes(self) -> tuple[ModelConfig, Architecture]:
        with said_of(f"{self.option}: {self.folder / CONFIG}"):
            model = self.format.read_model_config(self.config)
            return model, resolve_architecture(model)

    def _check_form(self) -> None:
        if self.naming.form != self.form:
            raise UserError(
                f"{self.option}: {self.folder / CONFIG} is of the {self.form} form, but the tensors beside it are "
                f"named as in the {self.naming.form} form; give a folder of which both are of one"
            )
        layers, tensors = self.architecture.num_layers, len(self.files.tensors)
        if layers > tensors:
            raise UserError(f"{self.option}: {self.folder / CONFIG} wants {layers} layers, there are {tensors} tensors")

    def _check_tensors(self) -> None:
        shapes = self.format.weights.huggingface_shapes(self.architecture)
        wanted = {self.naming.on_disk(name): shape for name, shape in shapes.items()}
        extra = [n for n in self.files.tensors if n not in wanted and self.naming.companion(n) is None]
        self._check_against(wanted, extra)

    def _check_companions(self) -> None:
        with said_of(f"{self.option}: {self.folder / CONFIG}"):
            wanted = self.format.companion_shapes(self.config)
        if wanted is None:
            return
        prefix = self.naming.companion_prefix
        self._check_against(
            {f"{prefix}{name}": shape for name, shape in wanted.items()},
            sorted(f"{prefix}{name}" for name in self.companions.keys() - wanted.keys()),
        )

    def _check_against(self, wanted: dict[str, tuple[int, ...]], extra: list[str]) -> None:
        found = self.files.tensors
        missing = [name for name in wanted if name not in found]
        if missing:
            raise UserError(f"{self.option}: {self.folder} lacks tensor {missing[0]}{_and_more(missing)}")
        if extra:
            raise UserError(
                f"{self.option}: tensor {extra[0]} in {found[extra[0]].file}{_and_more(extra)} belongs to no model of "
                f"this family with the sizes in {CONFIG}"
            )
        for name, shape in wanted.items():
            check_shape(name, found[name], shape, self.option)

    def _one_dtype(self, reading: Reading) -> torch.dtype:
        names = [self.naming.on_disk(name) for name in self.format.weights.huggingface_shapes(self.architecture)]
        return one_dtype({name: self.files.tensors[name].dtype for name in names}, reading.dtype)


def check_shape(name: str, found: TensorInfo, shape: tuple[int, ...], option: str) -> None:
    """Raise :class:`UserError` for a tensor of another shape than its ``config.json`` wants."""
    if found.shape != shape:
        raise UserError(
            f"{option}: tensor {name} in {found.file} has shape {list(found.shape)}, {CONFIG} wants {list(shape)}"
        )


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def read_config(folder: Path, option: str) -> Json:
    """The contents of ``config.json``; raises :class:`UserError` where there is none or it is damaged."""
    if not folder.is_dir():
        raise UserError(f"{option}: no folder at {folder}; hf download ORG/NAME --local-dir {folder} makes one")
    path = folder / CONFIG
    if not path.is_file():
        what = "an adapter; merge it into its base first" if (folder / "adapter_config.json").is_file() else None
        hint = f"it is {what}" if what else "give a folder as from_pretrained takes it"
        raise UserError(f"{option}: {folder} has no {CONFIG}; {hint}")
    try:
        config = json.loads(path.read_text())
    except (ValueError, RecursionError):
        raise UserError(f"{option}: {path} is not valid JSON") from None
    if not isinstance(config, dict):
        raise UserError(f"{option}: {path} holds a {type(config).__name__} instead of an object")
    return config


def recognise(config: Json, folder: Path, option: str) -> HuggingFaceFormat:
    """The family that a configuration belongs to; raises :class:`UserError` that says what it is otherwise."""
    kind = config.get("model_type")
    for family in FAMILIES.values():
        if family.huggingface and isinstance(kind, str) and kind in family.huggingface.model_types:
            return family.huggingface
    known = ", ".join(name for name, family in FAMILIES.items() if family.huggingface)
    raise UserError(
        f"{option}: {folder / CONFIG}: model_type {kind!r} (architectures {config.get('architectures')}) is not of a "
        f"family known here ({known})"
    )


def companion_files(folder: Path) -> list[Path]:
    """Files that travel along as they are: configurations, tokenizers, remote code; no weights, nothing hidden.

    Subfolders stay behind. A link to nothing is listed: copying it fails, instead of losing a tokenizer in silence.

    Raises:
        UserError: a symbolic link out of the folder, into anything but the hub's cache: what it leads to would be
            published with the model.
    """
    files = sorted(
        path
        for path in folder.iterdir()
        if not path.is_dir()
        and not path.name.startswith(".")
        and path.suffix not in _WEIGHTS
        and not path.name.endswith(".index.json")
    )
    real = os.path.realpath(folder)
    places = tuple(f"{place}/" for place in (real, hub_blobs(real)) if place is not None)
    for path in files:
        if path.is_symlink() and path.exists() and not os.path.realpath(path).startswith(places):
            raise UserError(f"{path} is a symbolic link that leaves the folder; copy the file there")
    return files
