"""A Hugging Face folder's weights into model chunks of any layout, without a Megatron checkpoint in between."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_cca.checkpoint.huggingface.importing import gathered_rows
from megatron_cca.checkpoint.huggingface.source import HuggingFaceCheckpoint
from megatron_cca.models.initialization import sharded_tensors
from megatron_cca.models.weight_map import MappedTensor


@torch.no_grad()
def load_weights(source: HuggingFaceCheckpoint, chunks: Sequence[torch.nn.Module]) -> None:
    """Fill this rank's model chunks, each of its tensors read alone; rows that pad the vocabulary become zeros.

    Args:
        source: of the same sizes as the chunks.
        chunks: of :func:`megatron_cca.models.gpt.build_gpt`, in any precision.

    Raises:
        UserError: a damaged file.
    """
    tensors = {(tensor.key, tensor.layer): tensor for tensor in source.format.weights.tensors(source.architecture)}
    for chunk in chunks:
        for shard in sharded_tensors(chunk.sharded_state_dict()):
            layer = shard.global_offset[0] if shard.prepend_axis_num else None
            _fill(shard, source, tensors[shard.key, layer])


def _fill(shard: ShardedTensor, source: HuggingFaceCheckpoint, tensor: MappedTensor) -> None:
    offset = shard.global_offset[shard.prepend_axis_num :]
    rows, *columns = shard.local_shape
    start = offset[0]
    stop = min(start + rows, tensor.num_rows)
    found = gathered_rows(source, tensor, start, stop) if start < stop else None
    shard.data.zero_()
    if found is not None:
        part = found[:, offset[1] : offset[1] + columns[0]] if columns else found
        shard.data.view(rows, *columns)[: stop - start] = part.to(shard.data.device)
