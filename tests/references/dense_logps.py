"""The textbook way to log-probabilities: all logits at once."""

import torch


def dense_token_logps(hidden, weight, targets, mask, vocab_size, support=None, bias=None):
    """[B, S] from hidden [S, B, H] and the whole head [>= vocab_size, H], in their precision; 0 where masked out.

    Words outside of the support, a range of ids, have no probability; None is the whole vocabulary.
    """
    logits = hidden.transpose(0, 1) @ weight[:vocab_size].t()
    if bias is not None:
        logits = logits + bias[:vocab_size]
    if support is not None:
        outside = torch.ones(vocab_size, dtype=torch.bool)
        outside[support.start : support.stop] = False
        logits = logits.masked_fill(outside, -torch.inf)
    logps = torch.log_softmax(logits, -1).gather(-1, targets.clamp(0, vocab_size - 1)[..., None]).squeeze(-1)
    return torch.where(mask, logps, 0.0)


def worst_relative_error(found, expected):
    """Greatest difference over the greatest expected magnitude; 0 where both are all zeros."""
    scale = expected.abs().max().item()
    difference = (found.double() - expected).abs().max().item()
    return difference / scale if scale else difference
