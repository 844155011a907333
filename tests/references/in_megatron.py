"""A rank's parts of a model's tensors beside whole ones under Megatron's names; no importer takes part."""

from __future__ import annotations

import torch

from megatron_cca.models.initialization import sharded_tensors

# Rows of no word hold this: whoever looks at them is seen.
JUNK = 3.0


def filled_up(rows, count):
    """The rows of words, and rows of none behind them."""
    return torch.cat([rows, torch.full((count - len(rows), *rows.shape[1:]), JUNK)])


def parts_on_this_rank(chunks, whole, frozen="nothing is"):
    """Each tensor of model chunks, as a view, and the same part of the whole one: ``(name, own, expected, whole)``.

    Those whose names begin with ``frozen`` are left out.
    """
    for shard in sharded_tensors([chunk.sharded_state_dict() for chunk in chunks]):
        stacked, name = shard.prepend_axis_num, shard.key
        if name.startswith(frozen):
            continue
        if stacked:
            name = name.replace("decoder.layers.", f"decoder.layers.{shard.global_offset[0]}.")
        places = zip(shard.global_offset[stacked:], shard.local_shape, strict=True)
        part = whole[name][tuple(slice(start, start + size) for start, size in places)]
        yield name, shard.data.view_as(part), part, whole[name]
