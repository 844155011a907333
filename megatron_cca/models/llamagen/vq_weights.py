"""Read the tensors of LlamaGen's image tokenizer, and its sizes, which follow only from their shapes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_cca.errors import UserError
from megatron_cca.models.llamagen.vq_network import NORM_GROUPS, VqSizes, network_on_meta
from megatron_cca.models.torch_file import tensors_in

_FIRST, _CODEBOOK = "encoder.conv_in.weight", "quantize.embedding.weight"
# Used in training alone: which codes the last batches used.
_IGNORED = ("quantize.codebook_used",)
# In the order of the authors' sampling and code extraction. "ema" is a training checkpoint's average.
_SECTIONS = ("model", "ema", "state_dict")
_DECODER = "tok_embeddings.weight"
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def read_vq(path: Path) -> tuple[VqSizes, dict[str, Tensor]]:
    """Return sizes and float32 tensors by the authors' names, as copies.

    Raises:
        UserError: a damaged file, one of another model, or tensors that do not fit each other. The message does not
            name the file.
    """
    found = tensors_in(path, _SECTIONS)
    stored = {name: tensor for name, tensor in found.items() if name not in _IGNORED}
    if _DECODER in stored:
        raise UserError(
            f"looks like LlamaGen's decoder ({_DECODER}); give the image tokenizer's own, such as vq_ds16_c2i.pt"
        )
    for name in (_FIRST, _CODEBOOK):
        if name not in stored:
            raise UserError(f"is not LlamaGen's image tokenizer: tensor {name} is missing")
    sizes = _sizes(stored)
    wanted = {name: tuple(tensor.shape) for name, tensor in network_on_meta(sizes).state_dict().items()}
    _check_shapes(stored, wanted)
    state = {name: _in_float32(name, stored[name]) for name in wanted}
    if not (lengths := state[_CODEBOOK].norm(dim=1)).all():
        raise UserError(f"tensor {_CODEBOOK}: vector {int(lengths.argmin())} is zero, which has no direction")
    return sizes, state


def _sizes(stored: Mapping[str, Tensor]) -> VqSizes:
    """Return the sizes. They are checked as far as building a network needs it."""
    levels = _counted(stored, "encoder.conv_blocks.{}.res.0.conv1.weight")
    blocks = _counted(stored, "encoder.conv_blocks.0.res.{}.conv1.weight")
    channels = [_channels(stored, f"encoder.conv_blocks.{level}.res.0.conv1.weight") for level in range(levels)]
    if not channels:
        raise UserError("tensor encoder.conv_blocks.0.res.0.conv1.weight is missing")
    if "encoder.conv_out.weight" not in stored:
        raise UserError("tensor encoder.conv_out.weight is missing")
    return VqSizes(
        _channels(stored, _FIRST),
        tuple(channels),
        blocks,
        _shape(stored, "encoder.conv_out.weight", 4)[0],
        *_shape(stored, _CODEBOOK, 2),
    )


def _counted(stored: Mapping[str, Tensor], name: str) -> int:
    return next(number for number in itertools.count() if name.format(number) not in stored)


def _channels(stored: Mapping[str, Tensor], name: str) -> int:
    channels = _shape(stored, name, 4)[0]
    if channels % NORM_GROUPS:
        raise UserError(f"tensor {name} has {channels} channels, not a multiple of the {NORM_GROUPS} groups of norms")
    return channels


def _shape(stored: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    shape = tuple(stored[name].shape)
    if len(shape) != dimensions:
        raise UserError(f"tensor {name} has shape {list(shape)}, which has not {dimensions} sizes")
    if 0 in shape:
        raise UserError(f"tensor {name} has shape {list(shape)}, which holds nothing")
    return shape


def _check_shapes(stored: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]]) -> None:
    for name in sorted(wanted.keys() - stored.keys()):
        raise UserError(f"tensor {name} is missing")
    for name in sorted(stored.keys() - wanted.keys()):
        raise UserError(f"tensor {name} is not one of LlamaGen's image tokenizer's")
    for name, shape in wanted.items():
        if tuple(stored[name].shape) != shape:
            raise UserError(f"tensor {name} has shape {list(stored[name].shape)}, {list(shape)} would fit the others")
        if stored[name].dtype not in _FLOATS:
            raise UserError(f"tensor {name} has dtype {stored[name].dtype}, which is no float of 16 to 64 bits")


def _in_float32(name: str, tensor: Tensor) -> Tensor:
    # A copy: the tensor may be a memory map, and the file may change.
    tensor = tensor.detach().to(torch.float32, copy=True).contiguous()
    if not tensor.isfinite().all():
        raise UserError(f"tensor {name} holds numbers that are not finite")
    return tensor
