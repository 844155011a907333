"""Read the tensors of Emu3's image tokenizer from safetensors files, under transformers' names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_cca.errors import UserError, error_context
from megatron_cca.models.emu3.vq_config import CONFIG, VqForm, read_json

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")

# Linear layers in transformers, 1 x 1 convolutions in the original.
_LINEAR = re.compile(r"\.(attn\.\d+|attn_1)\.(q|k|v|out)_proj\.weight$")

# Counts training batches. Evaluation does not read it.
IGNORED = "num_batches_tracked"


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


def _files(folder: Path) -> dict[str, Path]:
    """Return the file of each tensor."""
    if (folder / _SINGLE).is_file():
        with _opened(folder / _SINGLE) as tensors:
            return dict.fromkeys(tensors.keys(), folder / _SINGLE)
    if not (folder / _INDEX).is_file():
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
        hint = f" ({pickles[0]} is a pickle, which is not read; save it as safetensors)" if pickles else ""
        raise UserError(f"has neither {_SINGLE} nor {_INDEX}{hint}")
    with error_context(_INDEX):
        places = read_json(folder / _INDEX).get("weight_map")
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
        why = str(error).splitlines()[0]
        raise UserError(f"{path.name} is truncated or not a safetensors file: {why}") from None


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
                    raise UserError(f"tensor {name} is not in {file.name}, where {_INDEX} says it is")
                _check_tensor(name, tensors.get_slice(name), tuple(state[ours].shape), bool(_LINEAR.search(ours)))
                state[ours] = _in_float32(name, tensors.get_tensor(name)).reshape(state[ours].shape)
    return state


def _check_tensor(name: str, found: Any, wanted: tuple[int, ...], is_linear: bool) -> None:
    shape, dtype = tuple(found.get_shape()), found.get_dtype()
    if shape != wanted and not (is_linear and shape == (*wanted, 1, 1)):
        raise UserError(f"tensor {name} has shape {list(shape)}, {CONFIG} wants {list(wanted)}")
    if dtype not in _FLOATS:
        raise UserError(f"tensor {name} has dtype {dtype}, which is none of {', '.join(_FLOATS)}")


def _in_float32(name: str, tensor: Tensor) -> Tensor:
    # A copy: safetensors may return a memory map, and the file may change.
    tensor = tensor.to(torch.float32, copy=True)
    if not tensor.isfinite().all():
        raise UserError(f"tensor {name} holds numbers that are not finite")
    return tensor
