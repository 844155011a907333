"""Random weights that are the same for every layout. Each whole tensor is drawn by its name, then cut for each rank.

Megatron's own initialisation depends on the pipeline and tensor layout. Runs on different layouts would not be
comparable.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

# Weights that write into the residual stream start smaller by sqrt(2 * num_layers), as in GPT-2 and Megatron.
_RESIDUAL_OUTPUTS = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")

# A function that fills a chunk with random weights. It has the parameters of initialize_by_name.
Initialize = Callable[..., None]


@torch.no_grad()
def initialize_by_name(
    model: torch.nn.Module, *, seed: int, std: float, num_layers: int, vocab_size: int, output_size: int | None = None
) -> None:
    """Fill a model chunk: norms with ones, other weights with N(0, std), padding rows with zeros.

    Args:
        model: the chunk.
        seed: seed of all tensors.
        std: standard deviation of weights. Weights that write into the residual stream have a smaller one.
        num_layers: number of layers of the whole model.
        vocab_size: number of words of the embedding. Later rows are padding.
        output_size: number of words of the LM head. None means ``vocab_size``.
    """
    words = {"word_embeddings": vocab_size, "output_layer": output_size or vocab_size}
    shards = sharded_tensors(model.sharded_state_dict())
    for shard in shards:
        if "layernorm" in shard.key or "layer_norm" in shard.key:
            shard.data.fill_(1.0)
            continue
        scale = std / math.sqrt(2 * num_layers) if shard.key.endswith(_RESIDUAL_OUTPUTS) else std
        rows = next((size for name, size in words.items() if name in shard.key), None)
        shard.data.copy_(scale * standard_normal(shard, seed, rows).view_as(shard.data))


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
    stacked = shard.prepend_axis_num
    name = ".".join([shard.key, *map(str, shard.global_offset[:stacked])])
    shape, offset = list(shard.global_shape[stacked:]), shard.global_offset[stacked:]
    whole = torch.zeros(shape)
    whole[:rows].normal_(generator=_generator(name, seed))
    return whole[tuple(slice(start, start + size) for start, size in zip(offset, shard.local_shape, strict=True))]


def _generator(name: str, seed: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
