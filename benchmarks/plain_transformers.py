"""A CCA step without this project: transformers, PyTorch, four dense log-softmaxes.

It is the baseline of step.py. It follows the authors' fine-tuning script (thu-ml/CCA). Policy and reference compute
positives and negatives in one batch. Each half has its own ``log_softmax`` and ``gather``. Nothing of Megatron-Core is
imported.
"""

from __future__ import annotations

import copy
import time

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import Emu3ForCausalLM, Emu3TextConfig

from megatron_cca.platform import resident_bytes


def train(model: str, batches: str, settings: dict) -> dict:
    """Train on the stored batches; return each step's loss and seconds, and the peak of memory in bytes.

    Args:
        model: folder of an ``Emu3ForCausalLM`` in one safetensors file.
        batches: safetensors file with ``{step}.tokens``, ``.targets``, ``.mask`` and ``.flags`` of each step.
        settings: beta, negative_weight, lr, betas, eps, weight_decay, clip_grad, device.
    """
    device = settings["device"]
    with torch.device(device):
        policy = Emu3ForCausalLM(Emu3TextConfig.from_pretrained(model, attention_dropout=0.0))
    policy.load_state_dict(load_file(f"{model}/model.safetensors", device=device))
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in policy.parameters() if p.dim() > 1], "weight_decay": settings["weight_decay"]},
            {"params": [p for p in policy.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=settings["lr"],
        betas=settings["betas"],
        eps=settings["eps"],
    )
    stored = load_file(batches, device=device)
    losses, seconds = [], []
    for step in range(len(stored) // 4):
        batch = [stored[f"{step}.{name}"] for name in ("tokens", "targets", "mask", "flags")]
        _synchronize(device)
        started = time.perf_counter()
        losses.append(_step(policy, reference, optimizer, batch, settings))
        _synchronize(device)
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else resident_bytes(peak=True)
    return {"losses": losses, "seconds": seconds, "peak": peak}


def _step(policy, reference, optimizer, batch: list[Tensor], settings: dict) -> float:
    tokens, targets, mask, flags = batch
    with torch.no_grad():
        reference_logits = reference(tokens, use_cache=False).logits
    logits = policy(tokens, use_cache=False).logits
    positive_logits, negative_logits = logits.chunk(2)
    positive_reference_logits, negative_reference_logits = reference_logits.chunk(2)
    (positive_targets, negative_targets), (positive_mask, negative_mask) = targets.chunk(2), mask.chunk(2)
    positive = _image_logps(positive_logits, positive_targets, positive_mask)
    negative = _image_logps(negative_logits, negative_targets, negative_mask)
    positive_reference = _image_logps(positive_reference_logits, positive_targets, positive_mask)
    negative_reference = _image_logps(negative_reference_logits, negative_targets, negative_mask)
    beta, weight = settings["beta"], settings["negative_weight"]
    weights = torch.where(flags, 1.0, weight)
    signs = torch.where(flags, 1.0, -1.0)
    loss = -logsigmoid(beta * (positive - positive_reference)).mean()
    loss = loss - (weights * logsigmoid(signs * beta * (negative - negative_reference))).mean()
    loss = loss / max(weight, 1.0)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), settings["clip_grad"])
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def _image_logps(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    logps = torch.gather(logits.log_softmax(-1), dim=2, index=targets.unsqueeze(2)).squeeze(2)
    return (logps * mask).sum(-1)


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
