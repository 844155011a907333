"""Logits of whole rows on any layout, as training computes them."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region


@torch.no_grad()
def scheduled_logits(chunks, tokens):
    """Float32 ``[B, S, padded words]`` by Megatron's own schedule, without a cache; None but on the last stage.

    Args:
        chunks: this rank's of the model.
        tokens: int64 ``[B, S]``, this context-parallel rank's.
    """
    places = torch.arange(tokens.size(1)).expand_as(tokens)

    def forward_step(_iterator, chunk):
        return chunk(tokens, places, None), lambda logits, non_loss_data: gather_from_tensor_model_parallel_region(
            logits
        )

    found = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[None for _ in chunks],
        model=chunks,
        # As many as an interleaved pipeline needs, all alike.
        num_microbatches=parallel_state.get_pipeline_model_parallel_world_size(),
        seq_length=tokens.size(1),
        micro_batch_size=len(tokens),
        forward_only=True,
        collect_non_loss_data=True,
    )
    return found[0] if found else None
