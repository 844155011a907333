"""Emu3's decoder and a CCA training step in plain PyTorch, written from the papers; the oracle for Megatron's.

Weights come as Megatron's full (TP 1, PP 1) state dict of the local layer spec.
"""

from __future__ import annotations

import torch
from torch.nn.functional import silu


def rms_norm(x, weight, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rotate(x, base):
    """Half-rotation rotary embedding (arXiv 2104.09864); x is [B, S, heads, D]."""
    half = x.size(-1) // 2
    frequencies = base ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(x.size(1), dtype=torch.float64)[:, None] * frequencies
    cos, sin = (f(angles).to(x.dtype)[None, :, None] for f in (torch.cos, torch.sin))
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def attention(x, qkv, out, architecture):
    heads, groups = architecture.num_attention_heads, architecture.num_query_groups
    size = architecture.hidden_size // heads
    batch, length, _ = x.shape
    # Megatron interleaves: per group its query heads, then one key head, then one value head.
    mixed = (x @ qkv.t()).view(batch, length, groups, heads // groups + 2, size)
    query = rotate(mixed[..., :-2, :].reshape(batch, length, heads, size), architecture.rotary_base)
    key = rotate(mixed[..., -2, :], architecture.rotary_base).repeat_interleave(heads // groups, 2)
    value = mixed[..., -1, :].repeat_interleave(heads // groups, 2)
    scores = torch.einsum("bshd,bthd->bhst", query, key) / size**0.5
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    return torch.einsum("bhst,bthd->bshd", weights, value).reshape(batch, length, -1) @ out.t()


def logits(weights, tokens, architecture):
    """Next-token logits [B, S, vocabulary] of int tokens [B, S]."""
    eps = architecture.layernorm_epsilon
    x = weights["embedding.word_embeddings.weight"][tokens]
    for layer in range(architecture.num_layers):
        w = {name.split(f"layers.{layer}.")[1]: v for name, v in weights.items() if f"layers.{layer}." in name}
        normed = rms_norm(x, w["input_layernorm.weight"], eps)
        x = x + attention(
            normed, w["self_attention.linear_qkv.weight"], w["self_attention.linear_proj.weight"], architecture
        )
        gate, up = (rms_norm(x, w["pre_mlp_layernorm.weight"], eps) @ w["mlp.linear_fc1.weight"].t()).chunk(2, -1)
        x = x + (silu(gate) * up) @ w["mlp.linear_fc2.weight"].t()
    x = rms_norm(x, weights["decoder.final_layernorm.weight"], eps)
    return x @ weights["output_layer.weight"][: architecture.vocabulary.size].t()


def image_logps(weights, microbatch, architecture, words=slice(None)):
    """Sum of log p over the image tokens of each row; other words than these have no probability."""
    scores = logits(weights, microbatch.tokens, architecture)
    logps = torch.full_like(scores, -torch.inf)
    logps[..., words] = scores[..., words].log_softmax(-1)
    # Outside of the mask a target may have no probability, and -inf * 0 is no number.
    targets = torch.where(microbatch.mask, microbatch.targets, range(scores.size(-1))[words][0])
    return (logps.gather(-1, targets[..., None]).squeeze(-1) * microbatch.mask).sum(1)


def cca_loss(weights, reference, microbatch, architecture, beta, weight, words=slice(None)):
    """The authors' loss on one batch: positives in the first half of the rows, negatives in the second."""
    with torch.no_grad():
        base = image_logps(reference, microbatch, architecture, words)
    positive, negative = (image_logps(weights, microbatch, architecture, words) - base).chunk(2)
    sigma = torch.nn.functional.logsigmoid
    flagged = microbatch.negative_is_positive
    rows = -sigma(beta * positive)
    rows = rows - torch.where(flagged, sigma(beta * negative), weight * sigma(-beta * negative))
    return rows.mean() / max(weight, 1)


def ddo_loss(weights, reference, microbatch, architecture, beta, alpha):
    """arXiv 2503.01103: real images in the first half of the rows, drawn ones in the second."""
    with torch.no_grad():
        base = image_logps(reference, microbatch, architecture)
    real, drawn = (image_logps(weights, microbatch, architecture) - base).chunk(2)
    sigma = torch.nn.functional.logsigmoid
    return (-sigma(beta * real) - alpha * sigma(-beta * drawn)).mean()


def gft_loss(weights, _reference, microbatch, architecture, beta):
    """The authors' loss (arXiv 2501.15420): rows with their condition first, then the same images without it."""
    own, null = microbatch.tokens.chunk(2)
    conditional = logits(weights, own, architecture)[microbatch.mask.chunk(2)[0]]
    with torch.no_grad():
        unconditional = logits(weights, null, architecture)[microbatch.mask.chunk(2)[1]]
    targets = microbatch.targets.chunk(2)[0][microbatch.mask.chunk(2)[0]]
    return torch.nn.functional.cross_entropy(beta * conditional + (1 - beta) * unconditional, targets)


def train(start, batches, architecture, *, loss_of, lr, betas, eps, weight_decay, clip):
    """(loss, gradient norm) of each step, with torch's own AdamW and clipping.

    ``loss_of`` takes the weights, those of the start, a batch and the architecture.
    """
    weights = {name: torch.nn.Parameter(value.clone()) for name, value in start.items()}
    decayed = [value for value in weights.values() if value.dim() > 1]
    others = [value for value in weights.values() if value.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=lr,
        betas=betas,
        eps=eps,
    )
    trace = []
    for microbatch in batches:
        optimizer.zero_grad()
        loss = loss_of(weights, start, microbatch, architecture)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(weights.values(), clip)
        optimizer.step()
        trace.append((loss.item(), norm.item()))
    return trace
