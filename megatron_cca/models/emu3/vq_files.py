"""Find and read the files of Emu3's image tokenizer: the configuration's two forms, and the tensors.

original    BAAI/Emu3-VisionTokenizer: ``model_type`` "Emu3VisionVQ", tensors named by the original modules.
saved       what ``Emu3VQVAE.save_pretrained`` writes: ``model_type`` "emu3_vqgan".
composite   ``Emu3ForConditionalGeneration``: ``vq_config`` within its configuration, and the tensors that begin with
            ``vqmodel.`` or ``model.vqmodel.``. Those of the text model are not read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_cca.errors import UserError, error_context, first_line
from megatron_cca.models.formats import float32_copy, model_type_in, read_json
from megatron_cca.models.weight_files import CONFIG, INDEX, SINGLE

if TYPE_CHECKING:
    from megatron_cca.models.emu3.image_tokenizer import Emu3ImageTokenizer

# Sizes under transformers' names with the released model's values, and the original's names where they differ.
_RELEASED = {
    "codebook_size": 32_768,
    "embed_dim": 4,
    "latent_channels": 4,
    "double_latent": False,
    "in_channels": 3,
    "out_channels": 3,
    "temporal_downsample_factor": 4,
    "base_channels": 256,
    "channel_multiplier": [1, 2, 2, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [3],
}
_ORIGINAL_KEYS = {
    "latent_channels": "z_channels",
    "double_latent": "double_z",
    "base_channels": "ch",
    "channel_multiplier": "ch_mult",
}
# From the original's tensor names to transformers', applied one after the other.
_RENAMED = (
    (r"^encoder\.down\.", "encoder.down_block.down."),
    (r"^decoder\.up\.", "decoder.up_block.up."),
    (r"^(encoder|decoder)\.mid\.", r"\1.middle_block."),
    (r"\.middle_block\.attn_1\.norm\.", ".middle_block.attn_norm."),
    (r"\.attn\.(\d+)\.norm\.", r".attn_norms.\1."),
    (r"\.(attn\.\d+|attn_1)\.([qkv])\.", r".\1.\2_proj."),
    (r"\.(attn\.\d+|attn_1)\.proj_out\.", r".\1.out_proj."),
)
# The values of model_type in the three forms.
_MODEL_TYPES = ("Emu3VisionVQ", "emu3_vqgan", "emu3")
_FLOATS = ("F64", "F32", "F16", "BF16")
# Linear layers in transformers, 1 x 1 convolutions in the original.
_LINEAR = re.compile(r"\.(attn\.\d+|attn_1)\.(q|k|v|out)_proj\.weight$")
# Counts training batches. Evaluation does not read it.
IGNORED = "num_batches_tracked"


@dataclass(frozen=True)
class VqForm:
    """The names of one form: the prefixes of the tensors' names, and whether the rest is the original's."""

    prefixes: tuple[str, ...]
    original: bool = False

    def key(self, name: str) -> str:
        """Return this form's name of a key of the configuration."""
        return _ORIGINAL_KEYS.get(name, name) if self.original else name

    def transformers_name(self, name: str) -> str:
        """Return a tensor's name in transformers' model."""
        for pattern, replacement in _RENAMED if self.original else ():
            name = re.sub(pattern, replacement, name)
        return name


class Emu3VqFiles:
    """See :class:`megatron_cca.models.formats.ImageTokenizerFiles`."""

    description = f"the {CONFIG} and safetensors of Emu3's"

    def recognises(self, path: Path) -> bool:
        """See the protocol."""
        return (path / CONFIG).is_file()

    def knows(self, path: Path) -> bool:
        """See the protocol."""
        return model_type_in(path / CONFIG) in _MODEL_TYPES

    def open(
        self,
        path: Path,
        device: str | torch.device,
        weights: Path | None = None,
        scales: tuple[int, ...] = (),
    ) -> Emu3ImageTokenizer:
        """See the protocol."""
        from megatron_cca.models.emu3.image_tokenizer import open_emu3_vq

        return open_emu3_vq(path, device, weights=weights)


def recognise(config: dict[str, Any]) -> tuple[VqForm, dict[str, Any]]:
    """Return the form, and the section with the sizes."""
    kind = config.get("model_type")
    if kind == "Emu3VisionVQ":
        return VqForm(("",), original=True), config
    if kind == "emu3_vqgan":
        return VqForm(("",)), config
    if kind != "emu3" and "vq_config" not in config:
        raise UserError(
            f"model_type {repr(kind)[:60]} is not an Emu3 image tokenizer's: Emu3VisionVQ, emu3_vqgan, or emu3 with a "
            "vq_config"
        )
    section = config.get("vq_config", {})
    if not isinstance(section, dict):
        raise UserError(f"vq_config: must be an object, found {repr(section)[:60]}")
    return VqForm(("vqmodel.", "model.vqmodel.")), section


def sizes_in(section: Mapping[str, Any], form: VqForm, num_tensors: int) -> dict[str, Any]:
    """Return the sizes by transformers' names.

    They are checked as far as transformers has no clear message of its own.
    """
    sizes = {name: section.get(form.key(name), released) for name, released in _RELEASED.items()}
    for name, released in _RELEASED.items():
        _check_type(form.key(name), sizes[name], released)
    for name, value in (("double_latent", False), ("in_channels", 3), ("out_channels", 3)):
        if sizes[name] != value:
            raise UserError(f"{form.key(name)}: {sizes[name]!r} is not what Emu3 has, {value!r}")
    if sizes["embed_dim"] != sizes["latent_channels"]:
        raise UserError(f"embed_dim: {sizes['embed_dim']} differs from {form.key('latent_channels')}; Emu3's do not")
    factor, levels = sizes["temporal_downsample_factor"], sizes["channel_multiplier"]
    if factor & (factor - 1):
        raise UserError(f"temporal_downsample_factor: {factor} is not a power of two")
    # Checked before a network of these sizes is built.
    if factor.bit_length() + len(levels) * sizes["num_res_blocks"] > num_tensors:
        raise UserError(f"wants more layers than the {num_tensors} tensors beside it make up")
    return sizes | _attention(section, form, sizes)


def normalisation(folder: Path) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation, from the first of transformers' two files that has them."""
    for name, section_key in (("processor_config.json", "image_processor"), ("preprocessor_config.json", None)):
        path = folder / name
        if path.is_file():
            with error_context(path):
                found = read_json(path)
                if section_key is None or section_key in found:
                    return _mean_and_std(found if section_key is None else found[section_key])
    return [0.5] * 3, [0.5] * 3


def stored_tensors(folder: Path, form: VqForm) -> dict[str, tuple[str, Path]]:
    """Return the tensors of a form: for each of transformers' names the name on disk and the file."""
    files = _files(folder)
    prefix = next((start for start in form.prefixes if any(name.startswith(start) for name in files)), None)
    if prefix is None:
        raise UserError(
            "has no tensors" + (f" that begin with {' or '.join(form.prefixes)}" if all(form.prefixes) else "")
        )
    stored: dict[str, tuple[str, Path]] = {}
    for name, file in files.items():
        if name.startswith(prefix):
            if not name.isprintable():
                raise UserError(f"tensor {name!r} has a name that is not one line of text")
            ours = form.transformers_name(name.removeprefix(prefix))
            if ours in stored:
                raise UserError(f"tensor {name} is there twice, also as {stored[ours][0]}")
            stored[ours] = name, file
    return stored


def read_tensors(model: torch.nn.Module, stored: Mapping[str, tuple[str, Path]]) -> dict[str, Tensor]:
    """Return the model's tensors in float32."""
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(IGNORED)}
    for name in sorted(state.keys() - stored.keys()):
        raise UserError(f"tensor {name} (by transformers' name) is missing")
    for name in sorted(stored.keys() - model.state_dict().keys()):
        raise UserError(f"tensor {stored[name][0]} is not one of this model's")
    for file in sorted({stored[name][1] for name in state}):
        with _opened(file) as tensors:
            present = set(tensors.keys())
            for ours in (name for name in state if stored[name][1] == file):
                name = stored[ours][0]
                if name not in present:
                    raise UserError(f"tensor {name} is not in {file.name}, where {INDEX} says it is")
                _check_tensor(name, tensors.get_slice(name), tuple(state[ours].shape), bool(_LINEAR.search(ours)))
                state[ours] = float32_copy(name, tensors.get_tensor(name)).reshape(state[ours].shape)
    return state


def _check_type(key: str, value: object, released: object) -> None:
    if isinstance(released, bool):
        right, what = isinstance(value, bool), "true or false"
    elif isinstance(released, int):
        right, what = _is_size(value, 1), "a positive integer"
    else:
        # Levels are counted from 0, and none may have attention.
        levels = key == "attn_resolutions"
        right = isinstance(value, list) and all(_is_size(item, 0 if levels else 1) for item in value)
        right, what = right and (levels or value != []), "a list of integers"
    if not right:
        raise UserError(f"{key}: must be {what}, found {repr(value)[:60]}")


def _is_size(value: object, lowest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and lowest <= value < 2**31


def _attention(section: Mapping[str, Any], form: VqForm, sizes: Mapping[str, Any]) -> dict[str, int]:
    """Return the width and heads of attention.

    In transformers all levels have one width, in the original each has its own.
    """
    multipliers = sizes["channel_multiplier"]
    width = sizes["base_channels"] * multipliers[-1]
    for level in sizes["attn_resolutions"]:
        if level < len(multipliers) and multipliers[level] != multipliers[-1]:
            raise UserError(
                f"attn_resolutions: level {level} is not as wide as the last, which transformers cannot have"
            )
    if form.original:
        return {"hidden_size": width, "num_attention_heads": 1}
    given = {key: section.get(key, default) for key, default in (("hidden_size", 1024), ("num_attention_heads", 1))}
    for key, value in given.items():
        _check_type(key, value, 1)
    if given["hidden_size"] != width:
        raise UserError(f"hidden_size: {given['hidden_size']} is not base_channels x the last multiplier, {width}")
    return given


def _mean_and_std(section: Any) -> tuple[list[float], list[float]]:
    if not isinstance(section, dict):
        raise UserError(f"image_processor: must be an object, found {repr(section)[:60]}")
    for key, value in (("do_rescale", True), ("do_normalize", True), ("rescale_factor", 1 / 255)):
        found = section.get(key, value)
        if not isinstance(found, int | float) or not math.isclose(found, value, rel_tol=1e-6):
            raise UserError(f"{key}: {repr(found)[:60]} is not what Emu3 has, {value}")
    return _numbers_per_channel(section, "image_mean", -math.inf), _numbers_per_channel(section, "image_std", 0.0)


def _numbers_per_channel(section: Mapping[str, Any], key: str, above: float) -> list[float]:
    found = section.get(key)
    numbers = found if isinstance(found, list) else [0.5 if found is None else found] * 3
    for number in numbers if len(numbers) == 3 else [None]:
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        if not is_number or not above < number < math.inf:
            raise UserError(f"{key}: must be a number or three of them, found {repr(found)[:60]}")
    return [float(number) for number in numbers]


def _files(folder: Path) -> dict[str, Path]:
    """Return the file of each tensor."""
    if (folder / SINGLE).is_file():
        with _opened(folder / SINGLE) as tensors:
            return dict.fromkeys(tensors.keys(), folder / SINGLE)
    if not (folder / INDEX).is_file():
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
        hint = f" ({pickles[0]} is a pickle, which is not read; save it as safetensors)" if pickles else ""
        raise UserError(f"has neither {SINGLE} nor {INDEX}{hint}")
    with error_context(INDEX):
        places = read_json(folder / INDEX).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
            raise UserError("must hold a weight_map from tensors to files")
        for file in set(places.values()):
            if Path(file).name != file or file in ("", "..") or "\0" in file:
                raise UserError(f"names {file[:60]!r}, which is not a file of the same folder")
    return {name: folder / file for name, file in places.items()}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file, and turn any error in it into one line."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise UserError("needs safetensors; pip install 'megatron-cca[hf]'") from None
    try:
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except FileNotFoundError:
        raise UserError(f"{path.name} is missing, or may not be read") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path.name} is truncated or not a safetensors file: {first_line(error)}") from None


def _check_tensor(name: str, found: Any, wanted: tuple[int, ...], is_linear: bool) -> None:
    shape, dtype = tuple(found.get_shape()), found.get_dtype()
    if shape != wanted and not (is_linear and shape == (*wanted, 1, 1)):
        raise UserError(f"tensor {name} has shape {list(shape)}, {CONFIG} wants {list(wanted)}")
    if dtype not in _FLOATS:
        raise UserError(f"tensor {name} has dtype {dtype}, which is none of {', '.join(_FLOATS)}")
