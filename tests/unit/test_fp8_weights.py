"""Weights kept in FP8: what they round to, what they take, and that they are there only while they are used."""

import pytest
import torch

from megatron_cca.models.frozen_weights import dequantize_rows, keep_in_fp8, quantize_rows


def random_matrix(rows=32, columns=48, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    # Rows of very different sizes: one scale for all would round the small ones to nothing.
    sizes = 10.0 ** torch.linspace(-6, 3, rows)
    return (sizes[:, None] * torch.randn(rows, columns, generator=generator)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_row_keeps_three_bits_of_its_own_size(dtype):
    weight = random_matrix(dtype=dtype)
    values, scales = quantize_rows(weight)
    assert values.dtype == torch.float8_e4m3fn and values.shape == weight.shape
    assert scales.dtype == torch.float32 and scales.shape == (32, 1)
    error = (dequantize_rows(values, scales, torch.float64) - weight.double()).abs()
    largest = weight.double().abs().amax(dim=1, keepdim=True)
    # E4M3: relative spacing 1/8, so half of it when rounded to nearest; below 2^-6 of 448 the spacing stays.
    assert (error <= torch.maximum(weight.double().abs() / 16, largest / 448 * 2**-10) * 1.01).all()


def test_the_largest_number_of_a_row_is_exact():
    weight = random_matrix()
    values, scales = quantize_rows(weight)
    largest = weight.abs().argmax(dim=1, keepdim=True)
    assert (values.float().gather(1, largest).abs() == 448).all()
    torch.testing.assert_close(
        dequantize_rows(values, scales, torch.float32).gather(1, largest), weight.gather(1, largest), rtol=2e-7, atol=0
    )


def test_what_the_format_has_is_kept_exactly():
    exact = torch.tensor([[448.0, -1.75, 0.015625, 0.0], [0.0, 0.0, 0.0, 0.0]])
    values, scales = quantize_rows(exact)
    assert torch.equal(dequantize_rows(values, scales, torch.float32), exact)
    assert scales.flatten().tolist() == [1.0, 1.0]


class Block(torch.nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.word_embeddings = torch.nn.Embedding(10, 8, dtype=dtype)
        self.norm = torch.nn.RMSNorm(8, dtype=dtype)
        self.linear_fc1 = torch.nn.Linear(8, 6, bias=False, dtype=dtype)
        self.output_layer = torch.nn.Linear(6, 10, bias=False, dtype=dtype)

    def forward(self, ids):
        return self.output_layer(self.linear_fc1(self.norm(self.word_embeddings(ids))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_computes_with_what_its_weights_round_to(dtype):
    torch.manual_seed(0)
    model, rounded = Block(dtype), Block(dtype)
    rounded.load_state_dict(model.state_dict())
    for module in (rounded.word_embeddings, rounded.linear_fc1):
        module.weight.data = dequantize_rows(*quantize_rows(module.weight.data), dtype)
    unrounded = model(torch.arange(10))
    keep_in_fp8([model])
    ids = torch.arange(10)
    assert torch.equal(model(ids), rounded(ids))
    assert torch.equal(model(ids), rounded(ids))
    assert not torch.equal(model(ids), unrounded)


def test_between_passes_only_the_small_copy_is_held():
    model = Block(torch.bfloat16)
    head, norm = model.output_layer.weight.clone(), model.norm.weight.clone()
    keep_in_fp8([model])
    for module in (model.word_embeddings, model.linear_fc1):
        assert module.weight.numel() == 0
        assert module.weight_fp8.dtype == torch.float8_e4m3fn
    assert torch.equal(model.output_layer.weight, head) and torch.equal(model.norm.weight, norm)
    model(torch.arange(3))
    assert model.linear_fc1.weight.numel() == 0
    assert not any(name.startswith("weight_fp8") for name in model.state_dict())
