"""Random weights that are the same for every layout: each tensor is drawn from its name, then cut to this rank's part.

Megatron's own initialisation depends on the pipeline and tensor layout, so that runs could not be compared.
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

# Fills a chunk with random weights; takes the arguments of initialize_by_name.
Initialize = Callable[..., None]


@torch.no_grad()
def initialize_by_name(
    model: torch.nn.Module, *, seed: int, std: float, num_layers: int, vocab_size: int, output_size: int | None = None
) -> None:
    """Fill a pipeline stage: norms with ones, other weights with N(0, std), rows of no word with zeros.

    Args:
        model: a chunk.
        seed: of all tensors.
        std: of weights; less where they write into the residual stream.
        num_layers: of the whole model.
        vocab_size: rows of the embedding that are words.
        output_size: likewise of the LM head; None means as many.
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
    """Every sharded tensor in a sharded state; their data are views of the parameters."""
    if isinstance(tree, ShardedTensor):
        return [tree]
    if isinstance(tree, ShardedTensorFactory):
        return sharded_tensors(tree.build())
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [shard for item in tree for shard in sharded_tensors(item)] if isinstance(tree, list) else []


def standard_normal(shard: ShardedTensor, seed: int, rows: int | None = None) -> Tensor:
    """This rank's part of a whole tensor (one layer's, where layers are stacked) of N(0, 1), drawn from seed and name.

    Args:
        shard: says which tensor and which part; float32 of its ``local_shape`` is returned, on the CPU.
        seed: of all tensors; each name gives numbers of its own.
        rows: those after the first so many are zero; None means all are drawn.
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
