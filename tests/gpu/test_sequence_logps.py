"""The fused kernels on a real GPU against the plain ones and against float64, at Emu3's vocabulary."""

import pytest
import torch

from megatron_cca.parallel import sequence_logps, tiles
from tests.references.dense_logps import dense_token_logps, worst_relative_error

pytestmark = pytest.mark.gpu
S, B, H, V, PADDED = 40, 2, 256, 184_622, 184_704


def inputs(dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    kind = {"device": "cuda", "generator": generator}
    hidden = torch.randn(S, B, H, **kind).to(dtype)
    weight = torch.randn(PADDED, H, **kind).mul_(2 * H**-0.5).to(dtype)
    targets = torch.randint(0, V, (B, S), **kind)
    targets[0, :4] = torch.tensor([0, 15487, 15488, V - 1])
    return hidden, weight, targets, torch.rand(B, S, **kind) < 0.8


def run(hidden, weight, targets, mask):
    hidden, weight = (tensor.clone().requires_grad_() for tensor in (hidden, weight))
    values = sequence_logps(hidden, weight, targets, mask, vocab_size=V, chunk_size=33)
    values.backward(torch.tensor([1.0, -0.5], device="cuda"))
    return values.detach(), hidden.grad, weight.grad


def exact(hidden, weight, targets, mask):
    hidden, weight = (tensor.double().requires_grad_() for tensor in (hidden, weight))
    values = dense_token_logps(hidden, weight, targets, mask, V).sum(1)
    values.backward(torch.tensor([1.0, -0.5], device="cuda").double())
    return values.detach(), hidden.grad, weight.grad


@pytest.mark.needs_hardware("Triton")
def test_the_fused_kernels_are_what_runs():
    assert tiles.operations_for(torch.device("cuda")).__name__.endswith("triton_tiles")


def test_fp32_equals_float64():
    batch = inputs(torch.float32)
    for found, expected in zip(run(*batch), exact(*batch), strict=True):
        assert worst_relative_error(found, expected) < 1e-5


@pytest.mark.needs_hardware("Triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_equals_plain(dtype, monkeypatch):
    batch = inputs(dtype)
    fused = run(*batch)
    monkeypatch.setattr(tiles, "operations_for", lambda device: tiles)
    for mine, plain in zip(fused, run(*batch), strict=True):
        assert worst_relative_error(mine, plain.double()) < (1e-5 if dtype == torch.float32 else 1e-2)


def test_bfloat16_is_no_worse_than_dense_bfloat16_with_an_fp32_softmax():
    hidden, weight, targets, mask = inputs(torch.bfloat16)
    truth = exact(hidden, weight, targets, mask)
    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    logits = (leaves[0].transpose(0, 1) @ leaves[1][:V].t()).float()
    values = (torch.log_softmax(logits, -1).gather(-1, targets[..., None]).squeeze(-1) * mask).sum(1)
    values.backward(torch.tensor([1.0, -0.5], device="cuda"))
    usual = (values.detach(), *(leaf.grad for leaf in leaves))
    for mine, theirs, expected in zip(run(hidden, weight, targets, mask), usual, truth, strict=True):
        assert (mine.double() - expected).norm() <= 1.01 * (theirs.double() - expected).norm()


def test_the_weights_gradient_goes_into_main_grad_in_fp32():
    hidden, weight, targets, mask = inputs(torch.bfloat16)
    expected = exact(hidden, weight, targets, mask)[2]
    weight = weight.requires_grad_()
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(PADDED, H, device="cuda"), False
    values = sequence_logps(hidden, weight, targets, mask, vocab_size=V)
    values.backward(torch.tensor([1.0, -0.5], device="cuda"))
    assert weight.grad_added_to_main_grad
    assert worst_relative_error(weight.main_grad, expected) < 1e-2
    assert not torch.equal(weight.main_grad, weight.main_grad.bfloat16().float())
