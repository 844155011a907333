"""Random weights that are the same for every layout. Each whole tensor is drawn by its name, then cut for each rank.

Megatron's own initialisation depends on the pipeline and tensor layout. Runs on different layouts would not be
comparable.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megatron_cca.errors import UserError
from megatron_cca.models.gpt import unwrapped_gpt

# Weights that write into the residual stream start smaller by sqrt(2 * num_layers), as in GPT-2 and Megatron.
_RESIDUAL_OUTPUTS = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")

# A function that fills a chunk with random weights. It has the parameters of initialize_by_name.
Initialize = Callable[..., None]


@torch.no_grad()
def initialize_by_name(
    model: torch.nn.Module,
    *,
    seed: int,
    std: float,
    num_layers: int,
    vocab_size: int,
    output_size: int | None = None,
    frozen: Mapping[str, Tensor] | None = None,
) -> None:
    """Fill a model chunk: norms with ones, biases and padding rows with zeros, the rest with N(0, std).

    A model's class may say otherwise: ``first_values`` has functions by the end of a tensor's key. Each takes the whole
    tensor of N(0, std) and returns the values to begin with. The first end that fits counts. Tensors whose keys begin
    with ``frozen_prefix`` are given, not drawn.

    Args:
        model: the chunk.
        seed: seed of all tensors.
        std: standard deviation of weights. Weights that write into the residual stream have a smaller one.
        num_layers: number of layers of the whole model.
        vocab_size: number of words of the embedding. Later rows are padding.
        output_size: number of ids of the LM head. None means ``vocab_size``.
        frozen: whole tensors by their keys, which are never trained.

    Raises:
        UserError: the model has frozen tensors, and they are not given.
    """
    true_rows = {"word_embeddings": vocab_size, "output_layer": output_size or vocab_size}
    gpt = unwrapped_gpt(model)
    first_values, frozen_prefix = getattr(gpt, "first_values", {}), getattr(gpt, "frozen_prefix", None)
    for shard in sharded_tensors(model.sharded_state_dict()):
        own = next((values for end, values in first_values.items() if shard.key.endswith(end)), None)
        if frozen_prefix is not None and shard.key.startswith(frozen_prefix):
            shard.data.copy_(_frozen(shard, frozen or {}))
            continue
        if own is None and ("layernorm" in shard.key or "layer_norm" in shard.key):
            shard.data.fill_(1.0)
            continue
        if own is None and shard.key.endswith(".bias"):
            shard.data.zero_()
            continue
        scale = std / math.sqrt(2 * num_layers) if shard.key.endswith(_RESIDUAL_OUTPUTS) else std
        rows = next((size for name, size in true_rows.items() if name in shard.key), None)
        if own is None:
            part = scale * standard_normal(shard, seed, rows)
        else:
            part = _own_part(shard, own(scale * _whole_normal(shard, seed, rows)))
        shard.data.copy_(part.view_as(shard.data))


def sharded_tensors(tree) -> list[ShardedTensor]:
    """Return every sharded tensor in a sharded state. Their data are views of the parameters."""
    if isinstance(tree, ShardedTensor):
        return [tree]
    if isinstance(tree, ShardedTensorFactory):
        return sharded_tensors(tree.build())
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [shard for item in tree for shard in sharded_tensors(item)] if isinstance(tree, list) else []


def standard_normal(shard: ShardedTensor, seed: int, rows: int | None = None) -> Tensor:
    """Draw a tensor of N(0, 1) from seed and name, and return this rank's part of it.

    If layers are stacked, each layer is a tensor of its own.

    Args:
        shard: the tensor and this rank's part of it.
        seed: seed of all tensors. Each name gives other numbers.
        rows: number of rows to draw. Later rows are zero. None means all rows.

    Returns:
        float32, in the ``local_shape`` of ``shard``, on the CPU.
    """
    return _own_part(shard, _whole_normal(shard, seed, rows))


def _whole_normal(shard: ShardedTensor, seed: int, rows: int | None) -> Tensor:
    stacked = shard.prepend_axis_num
    name = ".".join([shard.key, *map(str, shard.global_offset[:stacked])])
    whole = torch.zeros(shard.global_shape[stacked:])
    whole[:rows].normal_(generator=_generator(name, seed))
    return whole


def _own_part(shard: ShardedTensor, whole: Tensor) -> Tensor:
    offset = shard.global_offset[shard.prepend_axis_num :]
    return whole[tuple(slice(start, start + size) for start, size in zip(offset, shard.local_shape, strict=True))]


def _frozen(shard: ShardedTensor, given: Mapping[str, Tensor]) -> Tensor:
    if shard.key not in given:
        raise UserError(
            f"training.pretrained_checkpoint: none, and this model has tensors of an image tokenizer ({shard.key}), "
            "which are not drawn; name a checkpoint from megatron-cca convert import, or data with a pyramid.npz"
        )
    return _own_part(shard, given[shard.key])


def _generator(name: str, seed: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
