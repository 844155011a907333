"""A recognised and checked Hugging Face folder: its configuration, and its tensors under the weight map's names."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megatron_cca.config import ModelConfig
from megatron_cca.errors import UserError, error_context
from megatron_cca.io.external_files import hub_blobs
from megatron_cca.models import FAMILIES, resolve_architecture
from megatron_cca.models.architecture import Architecture
from megatron_cca.models.formats import HuggingFaceFormat, Json
from megatron_cca.models.naming import recognise_naming
from megatron_cca.models.weight_files import (
    CONFIG,
    check_frequencies,
    chosen_set,
    is_recomputed,
    same_tensors,
    weight_sets,
)
from megatron_cca.models.weights_folder import TensorInfo, open_weights

HF, CHECKPOINT, HF_TEMPLATE, FORMAT = "--hf", "--checkpoint", "--hf-template", "--format"
PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16"}
# float32 holds every number of these dtypes exactly.
_WIDENED = (torch.float32, torch.bfloat16, torch.float16)
_REMEDY = "megatron-cca convert import --dtype fp32 widens them, which loses nothing"
# Files of weights in any format. They are not copied.
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".onnx", ".gguf"}


@dataclass(frozen=True)
class WeightsDescription:
    """A user's description of weights, because the files do not give it.

    Attributes:
        sizes: keys of the ``model`` section, for a file without a configuration.
        assumed: the same keys, used if neither the file nor ``sizes`` has them.
        section: which of several sets of weights to take. The error message lists them.
        dtype: ``fp32`` converts bf16, fp16 or mixed weights to fp32. None keeps their dtype.
        image_tokenizer: the image tokenizer's file, for a family whose models have tensors of it. None means the file
            beside the weights that has the usual name.
    """

    sizes: Mapping[str, float] = field(default_factory=dict)
    assumed: Mapping[str, float] = field(default_factory=dict)
    section: str | None = None
    dtype: Literal["fp32"] | None = None
    image_tokenizer: Path | None = None


UNDESCRIBED = WeightsDescription()


class HuggingFaceCheckpoint:
    """A folder with ``config.json`` and weights of a known family, in any of the family's forms.

    Attributes:
        folder: the folder.
        config: contents of ``config.json``.
        format: the family's format.
        form: the form within the format, ``original`` or ``transformers``.
        model: sizes of the model as a ``model`` section.
        architecture: the same sizes, resolved.
        dtype: dtype of all tensors of the decoder.
        companions: names of the tensors outside of the decoder, by the name that does not depend on the form.

    Raises:
        UserError: the family is not known, Megatron cannot have a size, there are several sets of weights, tensors are
            missing, unexpected or of another shape, dtypes are mixed or not supported, or a file is damaged. Names the
            key, tensor or file.
    """

    def __init__(self, folder: Path, option: str, description: WeightsDescription = UNDESCRIBED) -> None:
        self.folder, self.option = folder, option
        self.config = read_config(folder, option)
        self.format = recognise(self.config, folder, option)
        self.form = self.format.form(self.config)
        self.model, self.architecture = self._sizes()
        self.files = open_weights(folder, option)
        with error_context(f"{option}: {folder}"):
            self.files.tensors = self._own_tensors(description.section)
        self.naming = recognise_naming(self.format.namings, self.files.tensors)
        self._check_form()
        self._check_tensors()
        self.companions = {
            bare: name for name in self.files.tensors if (bare := self.naming.companion(name)) is not None
        }
        self._check_companions()
        with error_context(f"{option}: {folder}"):
            self.dtype = self._one_dtype(description)

    @property
    def precision(self) -> str:
        """The ``training.precision`` that has this dtype."""
        return PRECISIONS[self.dtype]

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows ``start .. stop`` of a decoder tensor, in :attr:`dtype`. ``name`` is from the weight map."""
        return self.files.read(self.naming.on_disk(name), start, stop).to(self.dtype)

    def frozen_tensors(self) -> dict[str, Tensor]:
        """Return no tensors. Models in a folder have all of their own."""
        return {}

    def companion_files(self) -> list[Path]:
        """Return the files to copy, see :func:`companion_files`."""
        return companion_files(self.folder)

    def _own_tensors(self, section: str | None) -> dict[str, TensorInfo]:
        """Return the tensors of the chosen set of weights, by the family's names, without those that are recomputed."""
        found = self.files.tensors
        markers = {naming.on_disk(self.format.marker) for naming in self.format.namings}
        sets = weight_sets(found, markers)
        if sets:
            are_alike = len(sets) > 1 and section is None and same_tensors(sets, self.files.equal)
            chosen = chosen_set(sets, section, are_alike=are_alike)
            found = chosen.weights | {name: found[name] for name in chosen.beside if section is None}
        computed = {name: info for name, info in found.items() if is_recomputed(name)}
        for name, info in computed.items():
            if name.endswith("inv_freq"):
                check_frequencies(name, self.files.read_info(info), self.architecture)
        return {name: info for name, info in found.items() if name not in computed}

    def _sizes(self) -> tuple[ModelConfig, Architecture]:
        with error_context(f"{self.option}: {self.folder / CONFIG}"):
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
        extra = [name for name in self.files.tensors if name not in wanted and self.naming.companion(name) is None]
        self._check_against(wanted, extra)

    def _check_companions(self) -> None:
        found = {bare: self.files.tensors[name].shape for bare, name in self.companions.items()}
        with error_context(f"{self.option}: {self.folder / CONFIG}"):
            wanted = self.format.companion_shapes(self.config, found)
        self._check_against(
            {self.naming.companion_on_disk(name): shape for name, shape in wanted.items()},
            sorted(self.companions[name] for name in found.keys() - wanted.keys()),
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

    def _one_dtype(self, description: WeightsDescription) -> torch.dtype:
        names = [self.naming.on_disk(name) for name in self.format.weights.huggingface_shapes(self.architecture)]
        return one_dtype({name: self.files.tensors[name].dtype for name in names}, description.dtype)


def read_config(folder: Path, option: str) -> Json:
    """Return the contents of ``config.json``.

    Raises:
        UserError: the file is missing or damaged.
    """
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
    """Return the format of the family that a configuration belongs to.

    Raises:
        UserError: the family is not known. Names the model type.
    """
    kind = config.get("model_type")
    for found in (family.huggingface for family in FAMILIES.values()):
        if found and isinstance(kind, str) and kind in found.model_types and found.knows(config):
            return found
    known = ", ".join(name for name, family in FAMILIES.items() if family.huggingface)
    raise UserError(
        f"{option}: {folder / CONFIG}: model_type {kind!r} (architectures {config.get('architectures')}) is not of a "
        f"family known here ({known})"
    )


def companion_files(folder: Path) -> list[Path]:
    """Return the files to copy unchanged: configurations, tokenizers, remote code.

    Weights, hidden files and subfolders are left out. A broken link is in the list: the copy then fails, so that no
    tokenizer is lost silently.

    Raises:
        UserError: a symbolic link leads out of the folder to another place than the hub's cache. An export would
            publish its target with the model.
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


def check_shape(name: str, found: TensorInfo, shape: tuple[int, ...], option: str) -> None:
    """Refuse a tensor of another shape than ``config.json`` requires.

    Raises:
        UserError: the shapes differ.
    """
    if found.shape != shape:
        raise UserError(
            f"{option}: tensor {name} in {found.file} has shape {list(found.shape)}, {CONFIG} wants {list(shape)}"
        )


def one_dtype(dtypes: Mapping[str, torch.dtype], asked: Literal["fp32"] | None = None) -> torch.dtype:
    """Return the dtype of all tensors, or float32 if ``asked`` wants it.

    Nothing is rounded: float16 and bfloat16 become float32 only if asked, and nothing becomes bfloat16.

    Args:
        dtypes: dtype of each tensor, by the name for messages.
        asked: ``fp32``, or None to keep the dtype.

    Raises:
        UserError: dtypes differ, or a dtype is not supported. Does not name the file.
    """
    (first, dtype), *others = dtypes.items()
    if asked == "fp32":
        wrong = [f"tensor {name} is {found}" for name, found in dtypes.items() if found not in _WIDENED]
        if wrong:
            raise UserError(f"{wrong[0]}, which float32 cannot hold without rounding")
        return torch.float32
    for name, other in others:
        if other != dtype:
            remedy = f"; {_REMEDY}" if {dtype, other} <= set(_WIDENED) else ""
            raise UserError(f"tensor {name} is {other}, {first} is {dtype}; they must be alike{remedy}")
    check_dtype(dtype, f"; {_REMEDY}" if dtype in _WIDENED else "")
    return dtype


def check_dtype(dtype: torch.dtype, remedy: str = "") -> None:
    """Refuse weights in a dtype that is not supported.

    Raises:
        UserError: the dtype is neither float32 nor bfloat16. Does not name the file.
    """
    if dtype not in PRECISIONS:
        raise UserError(f"is in {dtype}; models here are in float32 or bfloat16{remedy}")


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
