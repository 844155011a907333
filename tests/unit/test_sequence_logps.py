"""Chunked log-probabilities against a dense float64 log-softmax; tensor parallelism is in tests/distributed."""

import pytest
import torch

from megatron_cca.parallel import sequence_logps, token_logps

S, B, H, V = 7, 3, 16, 37


def inputs(dtype=torch.float32, padded=V, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    hidden = (scale * torch.randn(S, B, H, generator=generator)).to(dtype)
    weight = torch.randn(padded, H, generator=generator).to(dtype)
    targets = torch.randint(0, V, (B, S), generator=generator)
    return hidden, weight, targets


def masks():
    ragged = torch.arange(S)[None] < torch.tensor([[0], [3], [S]])
    return {"full": torch.ones(B, S, dtype=bool), "empty": torch.zeros(B, S, dtype=bool), "ragged": ragged}


def dense(hidden, weight, targets, mask):
    logits = hidden.double().transpose(0, 1) @ weight.double()[:V].t()
    logps = torch.log_softmax(logits, -1).gather(-1, targets[..., None]).squeeze(-1)
    return torch.where(mask, logps, 0.0)


@pytest.mark.parametrize("chunk_size", [1, 4, 1000])
@pytest.mark.parametrize("padded", [V, 64])
@pytest.mark.parametrize("mask", ["full", "empty", "ragged"])
def test_values_and_gradients_equal_float64(chunk_size, padded, mask):
    hidden, weight, targets = inputs(padded=padded)
    mask = masks()[mask]
    upstream = torch.randn(B, generator=torch.Generator().manual_seed(1))
    ours = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    oracle = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    logps = sequence_logps(ours[0], ours[1], targets, mask, vocab_size=V, chunk_size=chunk_size)
    expected = dense(oracle[0], oracle[1], targets, mask).sum(1)
    torch.testing.assert_close(logps.double(), expected, rtol=1e-5, atol=1e-6)
    logps.backward(upstream)
    expected.backward(upstream.double())
    for tensor, reference in zip(ours, oracle, strict=True):
        torch.testing.assert_close(tensor.grad.double(), reference.grad, rtol=1e-5, atol=1e-5)
    assert (ours[1].grad[V:] == 0).all()


def test_per_token_variant_is_zero_outside_the_mask():
    hidden, weight, targets = inputs()
    mask = masks()["ragged"]
    logps = token_logps(hidden, weight, targets, mask, vocab_size=V)
    torch.testing.assert_close(logps.double(), dense(hidden, weight, targets, mask), rtol=1e-5, atol=1e-6)
    assert (logps[~mask] == 0).all()


def test_extreme_logits_stay_finite():
    hidden, weight, targets = inputs(scale=2e3)
    mask = masks()["full"]
    logps = sequence_logps(hidden, weight, targets, mask, vocab_size=V)
    expected = dense(hidden, weight, targets, mask).sum(1)
    torch.testing.assert_close(logps.double(), expected, rtol=1e-5, atol=1e-3)


def test_bfloat16_is_no_worse_than_dense_bfloat16_with_an_fp32_softmax():
    hidden, weight, targets = inputs(torch.bfloat16)
    mask = masks()["full"]
    exact = dense(hidden, weight, targets, mask).sum(1)
    logits = (hidden.transpose(0, 1) @ weight.t()).float()
    usual = torch.log_softmax(logits, -1).gather(-1, targets[..., None]).squeeze(-1).sum(1)
    ours = sequence_logps(hidden, weight, targets, mask, vocab_size=V)
    assert ours.dtype == torch.float32
    assert (ours - exact).abs().max() <= 1.01 * (usual - exact).abs().max()
