"""Refuse a checkpoint whose master weights are not those of its weights.

Megatron-Core 0.19.2 wrote two such kinds with ``optimizer.use_precision_aware_optimizer``. By its default,
``store_param_remainders``, it keeps of a bf16 weight's master only the 16 bits that bf16 lacks, and saves them as whole
numbers in fp32, as if they were the master weights. Of fp32 weights it saves those that the run began with. No metadata
tells either kind. The weights of the model itself are whole.
"""

from __future__ import annotations

import math

import torch

from megatron_cca.checkpoint.stored_tensors import StoredTensors
from megatron_cca.errors import UserError

_MASTER = "optimizer.state.param."
# bf16 keeps 8 bits of a number. Masters in fp16 share one scale, which costs the smallest of them more.
_OF_A_WEIGHT, _OF_THE_LARGEST = 2.0**-8, 2.0**-24


def check_master_weights(stored: StoredTensors) -> None:
    """Refuse master weights that do not round to the weights; reads rows of the smallest tensors.

    Args:
        stored: the checkpoint; without a distributed optimizer's state it is not looked at.

    Raises:
        UserError: names the folder and what it is still good for.
    """
    names = [name for name in stored.names() if name.startswith(_MASTER) and name.removeprefix(_MASTER) in stored]
    for name in sorted(names, key=lambda name: math.prod(stored.shape(name))):
        master, weights = (_first_row(stored, one) for one in (name, name.removeprefix(_MASTER)))
        if not weights.any():
            # Adapters begin with zeros, which tell nothing.
            continue
        if not _round_to(master, weights):
            raise UserError(
                f"{stored.option}: {stored.folder} cannot be resumed: its master weights are not those of its weights, "
                "as earlier versions saved them under optimizer.use_precision_aware_optimizer; its weights are whole: "
                f"start another run (training.output_dir) with training.pretrained_checkpoint={stored.folder}, and "
                "with reference.checkpoint at the weights that this run began with"
            )
        return


def _first_row(stored: StoredTensors, name: str) -> torch.Tensor:
    shape = stored.shape(name)
    return stored.read_block(name, [0] * len(shape), [*(1 for _ in shape[:-1]), *shape[-1:]]).double()


def _round_to(master: torch.Tensor, weights: torch.Tensor) -> bool:
    allowed = _OF_A_WEIGHT * weights.abs() + _OF_THE_LARGEST * weights.abs().max()
    return bool(((master - weights).abs() <= allowed).all())
