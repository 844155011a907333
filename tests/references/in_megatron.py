"""A rank's parts of a model's tensors, filled from whole ones under Megatron's names; no importer takes part."""

from __future__ import annotations

import torch

from megatron_cca.models.initialization import sharded_tensors

# Rows of no word hold this: whoever looks at them is seen.
JUNK = 3.0


def filled_up(rows, count):
    """The rows of words, and rows of none behind them."""
    return torch.cat([rows, torch.full((count - len(rows), *rows.shape[1:]), JUNK)])


def parts_on_this_rank(chunks, whole):
    """Each tensor of model chunks, as a view, and the same part of the whole one: ``(name, own, expected, whole)``."""
    for shard in sharded_tensors([chunk.sharded_state_dict() for chunk in chunks]):
        stacked, name = shard.prepend_axis_num, shard.key
        if stacked:
            name = name.replace("decoder.layers.", f"decoder.layers.{shard.global_offset[0]}.")
        places = zip(shard.global_offset[stacked:], shard.local_shape, strict=True)
        part = whole[name][tuple(slice(start, start + size) for start, size in places)]
        yield name, shard.data.view_as(part), part, whole[name]


@torch.no_grad()
def fill(chunks, whole):
    """Copy this rank's parts of whole tensors into model chunks."""
    for _, own, part, _ in parts_on_this_rank(chunks, whole):
        own.copy_(part)
