"""The rig's own kernels against PyTorch's arithmetic, and what Transformer Engine's layers ask of them."""

from collections import Counter

import pytest
import torch

from tests.te import rig

if not rig.is_running():
    pytest.skip(f"tests the rig itself: {rig.COMMAND}", allow_module_level=True)

import transformer_engine_torch as tex
from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer

from tests.distributed.test_layout_parity import CCA, SIZED_BY_PRESET
from tests.gpu.test_reference_on_a_gpu import started, trace
from tests.te.rig import gemm, optimizers, quantization
from tests.te.runs import COMMON, TENSORWISE

E4M3 = tex.DType.kFloat8E4M3


@pytest.fixture
def random():
    return torch.Generator().manual_seed(0)


def test_tf32_is_float32_with_10_bits_of_mantissa(random):
    """Representable numbers stay; others go to the nearer neighbour, and from the middle to the even one."""
    step = 2.0**-10
    exact = torch.tensor([1.0, 1.0 + step, -3.5, 0.0, 2.0**100])
    assert torch.equal(gemm.as_tf32(exact), exact)
    halves = torch.tensor([1.0 + step / 2, 1.0 + 3 * step / 2, 1.0 + step * 0.51])
    assert torch.equal(gemm.as_tf32(halves), torch.tensor([1.0, 1.0 + 2 * step, 1.0 + step]))
    values = torch.randn(1000, generator=random)
    assert ((gemm.as_tf32(values) - values) / values).abs().max() <= step / 2


def test_fp8_is_near_and_its_transpose_the_same(random):
    values = torch.randn(32, 48, generator=random)
    found = Float8CurrentScalingQuantizer(E4M3, torch.device("cpu"))(values)
    # Half of the last of 3 bits of mantissa, and of the smallest number.
    bound = values.abs() * 2**-4 + values.abs().max() / 448 * 2**-10
    assert ((found.dequantize() - values).abs() <= bound).all()
    transposed = quantization.values_for_a_product(found, needs_transpose=True)
    assert torch.equal(transposed, quantization.values_for_a_product(found, needs_transpose=False))


def test_a_delayed_scale_is_of_the_largest_value_in_the_history():
    history, scale = torch.tensor([[3.0], [7.0], [5.0]]), torch.ones(1)
    quantization.update_delayed_scales(torch.tensor([3.0]), [history], [scale], "max", E4M3, 0)
    assert history.flatten().tolist() == [0.0, 5.0, 3.0]
    assert scale.item() == pytest.approx(448 / 7)


@pytest.mark.parametrize("form", ["float32", "master weights", "remainders"])
def test_adam_is_torchs(form, random):
    """From the same bfloat16 weights; a master weight that is kept in two parts has all its bits."""
    start = torch.randn(100, generator=random).bfloat16()
    expected = start.float().requires_grad_()
    torch_adam = torch.optim.AdamW([expected], lr=1e-2, weight_decay=0.1)
    parameter, first, second = start.float() if form == "float32" else start.clone(), *torch.zeros(2, 100)
    no_bits = torch.zeros(100, dtype=torch.int16)
    extra = {"float32": [], "master weights": [start.float()], "remainders": [no_bits]}[form]
    kernel = optimizers.adam_with_remainders if form == "remainders" else optimizers.adam
    for step in range(1, 6):
        expected.grad = torch.randn(100, generator=random)
        torch_adam.step()
        lists = [[expected.grad.clone()], [parameter], [first], [second], *([tensor] for tensor in extra)]
        kernel(0, torch.zeros(1), lists, 1e-2, 0.9, 0.999, 1e-8, step, 1, 1, 0.1)
    found = optimizers._join(parameter, *extra) if form == "remainders" else (extra or [parameter])[0]
    torch.testing.assert_close(found, expected.detach())
    torch.testing.assert_close(parameter.float(), expected.detach(), rtol=2**-8, atol=0)


OF_VAR = ["training.micro_batch_size=2", "training.global_batch_size=4", "data.pad_to_multiple_of=8"]


@pytest.mark.parametrize("family", ["Emu3", "VAR"])
def test_all_products_of_a_layer_are_in_fp8_and_the_heads_are_not(
    family, digit_shards, tiny_var, tmp_path, monkeypatch
):
    """Of each linear layer one product forward and two backward; the reference has two forward ones in step 0."""
    models = {"Emu3": [*CCA, f"data.path={digit_shards}", *COMMON], "VAR": [*SIZED_BY_PRESET, *tiny_var, *OF_VAR]}
    products = Counter()

    def spy(a, transpose_a, b, transpose_b, *others, **options):
        products[quantization.is_quantized(a), quantization.is_quantized(b)] += 1
        return gemm.generic_gemm(a, transpose_a, b, transpose_b, *others, **options)

    monkeypatch.setattr(tex, "generic_gemm", spy)
    run = started(*models[family], f"training.output_dir={tmp_path}", "reference.allow_bias=100", *TENSORWISE)
    layers, microbatches = {"Emu3": 2, "VAR": 3}[family], 2
    trace(run, 1)
    assert products == {(True, True): 4 * layers * microbatches * (2 + 3)}
