"""Adapters merged into their weights by plain arithmetic, from what a run's checkpoint holds."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_cca.checkpoint import layout
from megatron_cca.checkpoint.stored_tensors import StoredTensors


def opened(path: Path) -> StoredTensors:
    """The tensors of a checkpoint."""
    return StoredTensors(layout.resolve(path, "checkpoint"), "checkpoint")


def whole(stored: StoredTensors, name: str) -> torch.Tensor:
    """One of them."""
    shape = stored.shape(name)
    return stored.read_block(name, [0] * len(shape), shape)


def merged_by_hand(start: Path, run: Path, scale: float) -> dict[str, torch.Tensor]:
    """A run's weights under Megatron's names, all layers of a tensor in one, its adapters merged.

    Args:
        start: the checkpoint without adapters that the run started from.
        run: the run's folder.
        scale: alpha / dim.
    """
    stored, tensors = opened(run), {}
    for name in opened(start).names():
        tensors[name] = whole(stored, name)
        adapter = name.removesuffix("weight") + "adapter."
        if f"{adapter}linear_in.weight" in stored:
            linear_in, linear_out = (whole(stored, f"{adapter}linear_{end}.weight").double() for end in ("in", "out"))
            product = torch.einsum("lrd,ldc->lrc", linear_out, linear_in)
            tensors[name] = (tensors[name].double() + scale * product).float().to(tensors[name].dtype)
    return tensors
