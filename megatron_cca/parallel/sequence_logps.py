"""Log-probabilities of target tokens, straight from hidden states, without ever holding the logits.

A chunk of tokens at a time goes through the LM head. The softmax's maximum, its sum of exponentials and the target's
logit are reduced over the tensor-parallel group; backward recomputes the chunk. Vocabulary rows past ``vocab_size``
(padding) take no part, so the result does not depend on how the vocabulary was padded for a layout.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

DEFAULT_CHUNK_SIZE = 1024


def sequence_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    mask: Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
) -> Tensor:
    """Sum over masked-in positions of log p(target | prefix); float32 ``[B]``, nats.

    Args:
        hidden: ``[S, B, H]``, the full sequence on every tensor-parallel rank.
        weight: ``[V_local, H]``, this rank's rows of the LM head.
        targets: int64 ``[B, S]``; ``targets[b, s]`` is predicted by ``hidden[s, b]``.
        mask: bool ``[B, S]``; only these positions are computed at all.
        tp_group: the tensor-parallel group; None where the head is whole.
        vocab_size: the true size; rows at or past it never take part.
        chunk_size: tokens in one pass through the head.
    """
    return token_logps(
        hidden, weight, targets, mask, tp_group=tp_group, vocab_size=vocab_size, chunk_size=chunk_size
    ).sum(dim=1)


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    mask: Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
) -> Tensor:
    """Per-token variant of :func:`sequence_logps`: float32 ``[B, S]``, 0 where masked out."""
    positions = mask.t().reshape(-1).nonzero().squeeze(1)
    selected = hidden.reshape(-1, hidden.size(-1)).index_select(0, positions)
    selected_targets = targets.t().reshape(-1).index_select(0, positions)
    logps = _SelectedLogps.apply(selected, weight, selected_targets, tp_group, vocab_size, chunk_size)
    flat = torch.zeros(mask.numel(), dtype=torch.float32, device=hidden.device)
    return flat.index_copy(0, positions, logps).view(hidden.size(0), hidden.size(1)).t()


class _SelectedLogps(torch.autograd.Function):
    """Chunked vocab-parallel log-probabilities of N selected tokens: ``[N, H] -> [N]``."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, tp_group, vocab_size, chunk_size):
        shard = _VocabShard(weight, tp_group, vocab_size)
        logps = torch.empty(hidden.size(0), dtype=torch.float32, device=hidden.device)
        log_normalisers = torch.empty_like(logps)
        for rows in _chunks(hidden.size(0), chunk_size):
            logits = shard.logits(hidden[rows])
            peak = shard.reduce(logits.amax(dim=-1), dist.ReduceOp.MAX)
            sums = torch.stack([logits.sub(peak[:, None]).exp_().sum(-1), shard.gather_target(logits, targets[rows])])
            sum_exp, target_logits = shard.reduce(sums, dist.ReduceOp.SUM)
            log_normalisers[rows] = peak + sum_exp.log()
            logps[rows] = target_logits - log_normalisers[rows]
        ctx.save_for_backward(hidden, weight, targets, log_normalisers)
        ctx.settings = (tp_group, vocab_size, chunk_size)
        return logps

    @staticmethod
    def backward(ctx, grad_logps):
        hidden, weight, targets, log_normalisers = ctx.saved_tensors
        tp_group, vocab_size, chunk_size = ctx.settings
        shard = _VocabShard(weight, tp_group, vocab_size)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for rows in _chunks(hidden.size(0), chunk_size):
            probabilities = shard.logits(hidden[rows]).sub_(log_normalisers[rows, None]).exp_()
            grad_logits = probabilities.neg_()
            shard.add_one_at_target(grad_logits, targets[rows])
            grad_logits.mul_(grad_logps[rows, None])
            grad_logits = grad_logits.to(weight.dtype)
            grad_weight += grad_logits.t() @ hidden[rows]
            grad_hidden[rows] = grad_logits @ weight
        # Each rank's rows of the head give a part of the gradient of the hidden states, which are the same everywhere.
        return shard.reduce(grad_hidden, dist.ReduceOp.SUM), grad_weight.to(weight.dtype), None, None, None, None


class _VocabShard:
    """This rank's rows of the LM head and what it takes to reduce over the others'."""

    def __init__(self, weight: Tensor, tp_group: dist.ProcessGroup | None, vocab_size: int) -> None:
        self.weight = weight
        self.tp_group = tp_group if tp_group is not None and tp_group.size() > 1 else None
        self.start = weight.size(0) * (self.tp_group.rank() if self.tp_group is not None else 0)
        self.num_valid = min(max(vocab_size - self.start, 0), weight.size(0))

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 ``[n, V_local]``, minus infinity at padding rows."""
        logits = (hidden @ self.weight.t()).float()
        logits[:, self.num_valid :] = -torch.inf
        return logits

    def _local_targets(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        local = targets - self.start
        here = (local >= 0) & (local < self.num_valid)
        return torch.where(here, local, torch.zeros_like(local)), here

    def gather_target(self, logits: Tensor, targets: Tensor) -> Tensor:
        local, here = self._local_targets(targets)
        values = logits.gather(1, local[:, None]).squeeze(1)
        return torch.where(here, values, torch.zeros_like(values))

    def add_one_at_target(self, grad_logits: Tensor, targets: Tensor) -> None:
        local, here = self._local_targets(targets)
        grad_logits.scatter_add_(1, local[:, None], here.to(grad_logits.dtype)[:, None])

    def reduce(self, tensor: Tensor, op) -> Tensor:
        if self.tp_group is not None:
            tensor = tensor.contiguous()
            dist.all_reduce(tensor, op=op, group=self.tp_group)
        return tensor


def _chunks(total: int, size: int):
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))
