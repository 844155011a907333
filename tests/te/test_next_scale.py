"""VAR on Transformer Engine's layers: near the local ones, exact where the numbers are the same, in FP8, too."""

import pytest
import torch

from tests.distributed.test_layout_parity import SIZED_BY_PRESET
from tests.gpu.test_reference_on_a_gpu import BF16, FP8_WEIGHTS, LORA, OFFLOAD, SHARED, numbers, started, trace
from tests.te.runs import DELAYED, TENSORWISE

pytestmark = pytest.mark.gpu
# Four rows of 24 positions: a multiple of 16, as FP8's products want.
SHORT = ["training.micro_batch_size=2", "training.global_batch_size=4", "data.pad_to_multiple_of=8"]
LOCAL, ENGINE = "model.transformer_impl=local", "model.transformer_impl=transformer_engine"
ANY = "reference.allow_bias=100"


@pytest.fixture
def start(tiny_var, tmp_path):
    """Set up a run of VAR's tiny model with more overrides."""

    def begin(*overrides):
        return started(*SIZED_BY_PRESET, *tiny_var, *SHORT, f"training.output_dir={tmp_path}/run", *overrides)

    return begin


def losses(run, steps=4):
    return torch.tensor([report.metrics["loss"] for report in trace(run, steps)])


def test_engine_layers_are_the_local_ones(start):
    """Their products of float32 are TF32."""
    torch.testing.assert_close(losses(start(ENGINE)), losses(start(LOCAL)), rtol=1e-3, atol=0)
    torch.testing.assert_close(losses(start(ENGINE, BF16)), losses(start(LOCAL, BF16)), rtol=1e-2, atol=0)


@pytest.mark.parametrize("products", [[], [BF16], TENSORWISE])
@pytest.mark.parametrize("more", [[], [LORA]])
def test_the_log_ratio_begins_at_0_and_strategies_agree(products, more, start):
    resident = numbers(trace(start(*products, *more), 3))
    assert resident[0][2] == 0.0 < resident[1][2]
    assert numbers(trace(start(*products, *more, SHARED if more else OFFLOAD), 3)) == resident


@pytest.mark.parametrize("recipe", [TENSORWISE, DELAYED], ids=["tensorwise", "delayed"])
def test_fp8_products_are_near_those_of_float32(recipe, start):
    found, exact = losses(start(*recipe, ANY)), losses(start(LOCAL))
    assert not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, rtol=0.2, atol=0)


@pytest.mark.parametrize("more", [[], [OFFLOAD]])
def test_a_reference_with_weights_in_fp8_is_near(more, start):
    assert 0.0 < trace(start(BF16, ANY, FP8_WEIGHTS, *more), 1)[0].log_ratio.worst < 5.0


@pytest.mark.parametrize("granularity", ["full", "selective"])
@pytest.mark.parametrize("products", [[BF16], TENSORWISE, DELAYED], ids=["bf16", "tensorwise", "delayed"])
def test_recomputation_changes_nothing(products, granularity, start):
    """Delayed scales need not be those of a run without: they are compared to FP8's own precision."""
    how = [f"training.recompute_granularity={granularity}", "training.recompute_modules=[core_attn, mlp]"]
    plain, recomputed = (trace(start(*products, ANY, *more), 3) for more in ([], how))
    tolerance = 2e-2 if products == DELAYED else 1e-4
    for one, other in zip(plain, recomputed, strict=True):
        assert one.metrics["loss"] == pytest.approx(other.metrics["loss"], rel=tolerance)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=10 * tolerance)


@pytest.mark.parametrize("products", [[BF16], TENSORWISE], ids=["bf16", "tensorwise"])
def test_fused_weight_gradients_are_the_separate_ones(products, start):
    fusion = "kernels.gradient_accumulation_fusion="
    plain, fused = (losses(start(*products, ANY, f"{fusion}{value}")) for value in ("false", "true"))
    torch.testing.assert_close(fused, plain, rtol=1e-2, atol=0)
