"""The interfaces of a family's files: Hugging Face folders, the authors' own weights, the image tokenizer.

The functions are what image tokenizers have in common.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_cca.config import ModelConfig
from megatron_cca.errors import UserError, first_line
from megatron_cca.models.architecture import Architecture
from megatron_cca.models.naming import Naming
from megatron_cca.models.weight_map import WeightMap

Json = dict[str, Any]
Shapes = Mapping[str, tuple[int, ...]]
Sizes = Mapping[str, float]


class HuggingFaceFormat(Protocol):
    """A family's checkpoints on Hugging Face. Configurations are the contents of ``config.json``.

    Attributes:
        weights: the weight map.
        marker: the weight map's name of a tensor that every model has. Sets of weights in a folder are found by it.
        model_types: the values that ``model_type`` may have.
        namings: all namings of tensors on disk. The first of a form is used for writing.
    """

    weights: WeightMap
    marker: str
    model_types: frozenset[str]
    namings: Sequence[Naming]

    def knows(self, config: Json) -> bool:
        """Return whether a configuration with one of the types is of this family. Others may have the same types."""

    def form(self, config: Json) -> str:
        """Return the form of a configuration."""

    def read_model_config(self, config: Json) -> ModelConfig:
        """Return the ``model`` section with every size in the configuration.

        Raises:
            UserError: this family's Megatron model cannot have the value of a key. Names the key.
        """

    def write_config(self, template: Json | None, architecture: Architecture, dtype: str, form: str) -> Json:
        """Return a configuration in ``form`` for this model.

        Everything else is as in ``template``, which may have any form.

        Args:
            template: an existing configuration, or None.
            architecture: the sizes to write.
            dtype: of the weights, as torch spells it ("bfloat16").
            form: one of the namings' forms.

        Raises:
            UserError: this form needs a template, and there is none.
        """

    def companion_shapes(self, config: Json, found: Shapes) -> Shapes:
        """Return the shapes that the companion tensors must have, by name beside an imported checkpoint.

        Args:
            config: the configuration.
            found: the shapes of those that there are. Where a family does not know the shapes, it returns these.

        Raises:
            UserError: transformers refuses the configuration. The message is that of transformers.
        """

    def transformers_model(self, config: Json):
        """Return transformers' own decoder, on the meta device except for its buffers, in evaluation mode.

        Its parameters have the names of one of the namings, and its logits are those of the predicted ids.

        Raises:
            UserError: transformers refuses the configuration. The message is that of transformers.
        """


@dataclass(frozen=True)
class FrozenFile:
    """A file of another model, whose tensors a family's models have, too. They are float32 and never trained.

    Attributes:
        name: its usual name, under which it is looked for beside the weights.
        published: where it is published.
        marker: the name of a tensor that it has. A file of weights that has it holds the other model, too.
        read: returns its tensors by their keys in Megatron's checkpoint. Refuses a file that does not fit the sizes,
            and does not name the file.
    """

    name: str
    published: str
    marker: str
    read: Callable[[Path, Architecture], dict[str, Tensor]]


class WeightsFileFormat(Protocol):
    """A family's weights in one file.

    Attributes:
        weights: the weight map. It maps Megatron's names to the authors'.
        sections: keys that the authors' programs use for the tensors, beside what else they save. Exports use the
            first. Without any, an export holds the tensors alone.
        marker: the name of a tensor that every model of the family has. Sets of weights in a file are found by it.
        not_in_shapes: keys of the ``model`` section that do not always follow from shapes.
        frozen: the file that an import needs besides. None for most families.
    """

    weights: WeightMap
    sections: Sequence[str]
    marker: str
    not_in_shapes: Collection[str]
    frozen: FrozenFile | None = None

    def knows(self, names: Collection[str]) -> bool:
        """Return whether tensors of these names look like any model of the family."""

    def read_model_config(self, shapes: Shapes, given: Sizes, assumed: Sizes) -> ModelConfig:
        """Return the ``model`` section with every size.

        Args:
            shapes: of the tensors, computed ones included.
            given: sizes that the user gave, by key.
            assumed: values of ``not_in_shapes`` keys that neither shapes nor the user nor a released model give.

        Raises:
            UserError: an unsupported model of this family, a size that nothing gives, or a given size that is wrong.
                The message says what the model looks like.
        """

    def buffers(self, architecture: Architecture) -> dict[str, Tensor]:
        """Return the tensors in the authors' files that follow from the sizes. Exports have them, imports need none."""
        return {}

    def must_be_zero(self, name: str) -> bool:
        """Return whether a tensor of the weight map holds zeros in every model of the family."""
        return False


class ImageTokenizerFiles(Protocol):
    """The files of a family's image tokenizer.

    Attributes:
        description: what they are, for messages.
    """

    description: str

    def recognises(self, path: Path) -> bool:
        """Return whether a file or folder looks like one, by names of files alone."""

    def knows(self, path: Path) -> bool:
        """Return whether a path that was recognised holds files of this family, by what is cheap to read of them.

        It is asked where the files of several families have the same names.
        """

    def open(
        self,
        path: Path,
        device: str | torch.device,
        weights: Path | None = None,
        scales: tuple[int, ...] = (),
    ) -> ImageTokenizer:
        """Return the image tokenizer in a file or folder that was recognised.

        Args:
            path: the file or folder.
            device: the device that it runs on.
            weights: the folder of its tensors, for the files in a checkpoint. None means that they are in ``path``.
            scales: sides of the grids of codes that an image of the model consists of. Without any, the model has one
                grid of any size, or is not known.

        Raises:
            UserError: a file is missing or damaged, or is of another model. Names the file.
        """


class ImageTokenizer(Protocol):
    """A converter of images to codes of a codebook, and of codes to images.

    Attributes:
        kind: name of the kind, such as "emu3-vq" or "patch-codebook".
        spatial_factor: pixels per code along a side.
        temporal_factor: frames of video per frame of codes. 0 if clips are not supported.
        codebook_size: number of codes.
        scales: sides of the grids of a pyramid, smallest first. The codes of an image are then one row, ``h`` is 1 and
            ``w`` the number of all codes, and there are images of one size alone. Empty if the codes are one grid.
    """

    kind: str
    spatial_factor: int
    temporal_factor: int
    codebook_size: int
    scales: tuple[int, ...]

    def encode(self, pixels: Tensor) -> Tensor:
        """Return the codes of RGB images of one size, or of clips. They are on the device of ``pixels``.

        Args:
            pixels: uint8 ``[N, H, W, 3]`` or ``[N, T, H, W, 3]``, on any device.

        Returns:
            int64 ``[N, H / f, W / f]``, or ``[N, T / t, H / f, W / f]``.

        Raises:
            UserError: another dtype or shape, or a side or number of frames that the factors do not divide.
        """

    def decode(self, codes: Tensor) -> Tensor:
        """Return the images of codes. They are on the device of ``codes``.

        Args:
            codes: int64 ``[N, h, w]`` or ``[N, T, h, w]``, on any device.

        Returns:
            uint8 ``[N, h f, w f, 3]``, or ``[N, T t, h f, w f, 3]``.

        Raises:
            UserError: another dtype or shape, or a code outside the codebook.
        """

    def fingerprint(self) -> str:
        """Return a short hash of weights and configuration. Equal hashes mean that codes have the same meaning."""


def check_given_sizes(given: Sizes, found: Sizes) -> None:
    """Refuse sizes that the user gave and the tensors do not have.

    Raises:
        UserError: a key is no size of weights, or has another value. Names the key.
    """
    for key, value in given.items():
        if key not in found:
            raise UserError(f"model.{key}: is no size of the weights; leave it out")
        if found[key] != value:
            raise UserError(f"model.{key}: {value}, but the tensors have {found[key]}; leave it out")


def check_pixels(pixels: Tensor, spatial_factor: int, temporal_factor: int) -> None:
    """Check that pixels have the right dtype and shape, and that the factors divide their sides.

    Args:
        pixels: uint8 ``[N, H, W, 3]``. Also clips ``[N, T, H, W, 3]`` if ``temporal_factor`` is not 0.
        spatial_factor, temporal_factor: factors of the tokenizer.

    Raises:
        UserError: dtype, shape or a side is wrong.
    """
    shape = list(pixels.shape)
    if pixels.dtype != torch.uint8 or len(shape) not in (4, 5 if temporal_factor else 4) or shape[-1] != 3:
        wanted = "uint8 [N, H, W, 3]" + (" or [N, T, H, W, 3]" if temporal_factor else "")
        raise UserError(f"pixels: must be {wanted}, found {pixels.dtype} {shape}")
    for what, size in zip(("height", "width"), shape[-3:-1], strict=True):
        if size < 1 or size % spatial_factor:
            raise UserError(f"pixels: {what} {size} is not a multiple of {spatial_factor}")
    if len(shape) == 5 and (shape[1] < 1 or shape[1] % temporal_factor):
        raise UserError(f"pixels: {shape[1]} frames are not a multiple of {temporal_factor}")


def check_codes(codes: Tensor, codebook_size: int, temporal_factor: int) -> None:
    """Check that codes have the right dtype and shape, and are in the codebook.

    Args:
        codes: int64 ``[N, h, w]``. Also codes of clips ``[N, T, h, w]`` if ``temporal_factor`` is not 0.
        codebook_size, temporal_factor: sizes of the tokenizer.

    Raises:
        UserError: dtype or shape is wrong, or a code is not in the codebook.
    """
    shape = list(codes.shape)
    if codes.dtype != torch.int64 or len(shape) not in (3, 4 if temporal_factor else 3) or 0 in shape[1:]:
        wanted = "int64 [N, h, w]" + (" or [N, T, h, w]" if temporal_factor else "")
        raise UserError(f"codes: must be {wanted}, found {codes.dtype} {shape}")
    # Checked here, since a lookup outside the table ends a process on a GPU.
    if codes.numel() and not 0 <= (lowest := int(codes.min())) <= (highest := int(codes.max())) < codebook_size:
        raise UserError(f"codes: {lowest if lowest < 0 else highest} does not fit a codebook of {codebook_size}")


def model_type_in(path: Path) -> str | None:
    """Return ``model_type`` in a configuration's file. None if it cannot be read, or is no text."""
    try:
        found = read_json(path).get("model_type")
    except UserError:
        return None
    return found if isinstance(found, str) else None


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        UserError: it cannot be read, or holds none.
    """
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UserError("is not valid JSON") from None
    if not isinstance(found, dict):
        raise UserError("must hold a JSON object")
    return found


@contextmanager
def transformers_refusals() -> Iterator[None]:
    """Turn whatever transformers raises while it builds something into one line."""
    try:
        yield
    except Exception as error:
        raise UserError(f"transformers does not take it: {first_line(error)}") from None


@contextmanager
def full_float32(device_type: str) -> Iterator[None]:
    """Switch autocast and TF32 off inside the block.

    Less precision, such as cuDNN's default TF32, changes codes of images.
    """
    cudnn, mkldnn = torch.backends.cudnn, torch.backends.mkldnn
    with ExitStack() as undo:
        undo.enter_context(torch.autocast(device_type, enabled=False))
        _switch(undo, cudnn, "deterministic", True)
        _switch(undo, cudnn, "benchmark", False)
        if hasattr(cudnn, "conv"):  # torch 2.9
            _switch(undo, cudnn.conv, "fp32_precision", "ieee")
            _switch(undo, mkldnn.conv, "fp32_precision", "ieee")
        else:
            _switch(undo, cudnn, "allow_tf32", False)
        try:
            undo.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
        except RuntimeError:
            # torch cannot read its older switch once its newer ones were set.
            _switch(undo, torch.backends.cuda.matmul, "fp32_precision", "ieee")
            _switch(undo, mkldnn.matmul, "fp32_precision", "ieee")
        yield


def fingerprint(facts: Any, state: Mapping[str, Tensor]) -> str:
    """Return a short hash of facts, as JSON, and of named tensors on the CPU."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].contiguous().numpy())
    return digest.hexdigest()[:16]


def float32_copy(name: str, tensor: Tensor) -> Tensor:
    """Return a tensor in float32. It is a copy: a tensor may be a memory map, and the file may change.

    Raises:
        UserError: numbers that are not finite. Names the tensor.
    """
    tensor = tensor.detach().to(torch.float32, copy=True).contiguous()
    if not tensor.isfinite().all():
        raise UserError(f"tensor {name} holds numbers that are not finite")
    return tensor


def moved_to(model: torch.nn.Module, device: str | torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """Move a model to a device and return it.

    Raises:
        UserError: there is no such device, or no room on it.
    """
    try:
        return model.to(torch.device(device), dtype)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device}: {first_line(error)}") from None


def _switch(undo: ExitStack, place: Any, name: str, value: Any) -> None:
    undo.callback(setattr, place, name, getattr(place, name))
    setattr(place, name, value)
