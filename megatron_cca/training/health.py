"""Check before each update whether the loss and the gradients are finite."""

from __future__ import annotations

from collections import Counter

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megatron_cca.objectives import PairLogps, SequenceLogps
from megatron_cca.parallel.across_ranks import all_finite, any_rank, first_problem

_TERMS = {
    "policy_positive": "the policy's log p(x|c)",
    "policy_negative": "the policy's log p(x|c')",
    "reference_positive": "the reference's log p(x|c)",
    "reference_negative": "the reference's log p(x|c')",
    "policy": "the policy's log p(x|c)",
}


def not_finite(policy: list[DistributedDataParallel], loss_problem: str | None) -> str | None:
    """Return why there must be no update, in one line. Return None if all is finite. Collective over all ranks.

    If all is finite, it costs one pass over the gradients and two small all-reduces.

    Args:
        policy: model chunks whose gradients have been reduced.
        loss_problem: the result of :func:`terms_not_finite`, the same on every rank of a pipeline.
    """
    gradients_are_finite = all(all_finite(buffer.grad_data) for chunk in policy for buffer in chunk.buffers)
    problems = [first_problem(loss_problem)] if any_rank(loss_problem is not None) else []
    problems += [first_problem(_gradients_not_finite(policy))] if any_rank(not gradients_are_finite) else []
    return "; ".join(found for found in problems if found) or None


def terms_not_finite(rows: PairLogps | SequenceLogps) -> str | None:
    """Return which log-probabilities of a global batch are not finite, in one line. Return None if all are finite."""
    found = []
    for name, values in vars(rows).items():
        if torch.is_tensor(values) and values.is_floating_point():
            bad = int((~torch.isfinite(values)).sum())
            found += [f"{_TERMS.get(name, name)} in {bad} of {values.numel()} rows"] if bad else []
    return f"loss: NaN or infinity in {', '.join(found)}" if found else None


def _gradients_not_finite(policy: list[DistributedDataParallel]) -> str | None:
    bad = [name for name, gradient in _gradients(policy) if not all_finite(gradient)]
    if not bad:
        return None
    groups = Counter(_group(name) for name in bad)
    shown = [f"{group} ({count} tensor{'s' * (count > 1)})" for group, count in list(groups.items())[:3]]
    more = f" and {len(groups) - 3} more groups" if len(groups) > 3 else ""
    return f"gradients: NaN or infinity on rank {dist.get_rank()} in {', '.join(shown)}{more}, first in {bad[0]}"


def _gradients(policy: list[DistributedDataParallel]) -> list[tuple[str, Tensor]]:
    """Return the gradients with global names, which number the layers of the whole model."""
    found = []
    for chunk in policy:
        layers = chunk.module.decoder.layers
        for name, parameter in chunk.module.named_parameters():
            if parameter.requires_grad and getattr(parameter, "main_grad", None) is not None:
                head, _, tail = name.partition("decoder.layers.")
                number, _, rest = tail.partition(".")
                # Megatron counts layers from 1, but from 0 in the names of its checkpoints.
                place = f"{layers[int(number)].layer_number - 1}.{rest}" if tail else ""
                found.append((f"{head}decoder.layers.{place}" if tail else name, parameter.main_grad))
    return found


def _group(name: str) -> str:
    parts = name.split(".")
    return f"layer {parts[2]}" if name.startswith("decoder.layers.") else parts[0]
