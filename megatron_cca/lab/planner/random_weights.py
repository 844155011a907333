"""Random weights for measurements and counts, for any model: what they are does not matter there."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from megatron_cca.models.gpt import unwrapped_gpt
from megatron_cca.models.initialization import initialize_by_name, sharded_tensors


def draw_everything(
    model: torch.nn.Module, *, seed: int, frozen: Mapping[str, torch.Tensor] | None = None, **facts
) -> None:
    """Draw the weights of a model chunk, also tensors that training only takes from a checkpoint.

    Args:
        model: the chunk.
        seed: seed of all tensors.
        frozen: tensors that are given. Of the others, those that training does not draw are drawn, too.
        facts: see :func:`initialize_by_name`.
    """
    prefix, drawn = getattr(unwrapped_gpt(model), "frozen_prefix", None), {}
    if prefix is not None:
        random = torch.Generator().manual_seed(seed)
        shards = [one for one in sharded_tensors(model.sharded_state_dict()) if one.key.startswith(prefix)]
        drawn = {one.key: torch.randn(one.global_shape, generator=random) for one in shards}
    initialize_by_name(model, seed=seed, frozen=drawn | (frozen or {}), **facts)
