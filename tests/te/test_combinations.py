"""FP8 products together with what else changes a layer's weights or gradients."""

import pytest
import torch

from tests.gpu.fp8_runs import losses
from tests.gpu.test_reference_on_a_gpu import FP8_WEIGHTS, LORA, OFFLOAD, SHARED, numbers, start, trace
from tests.te.runs import COMMON, DELAYED, TENSORWISE

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("more", [[], [FP8_WEIGHTS]])
def test_an_offloaded_reference_is_the_resident_one(more, digit_shards, tmp_path):
    resident = numbers(trace(start(digit_shards, tmp_path / "a", *COMMON, *TENSORWISE, *more), 3))
    assert numbers(trace(start(digit_shards, tmp_path / "b", *COMMON, *TENSORWISE, *more, OFFLOAD), 3)) == resident


def test_adapters_share_the_weights_of_their_reference(digit_shards, tmp_path):
    own = numbers(trace(start(digit_shards, tmp_path / "a", *COMMON, *TENSORWISE, LORA), 3))
    assert own[0][2] == 0.0 and own[1][2] > 0.0
    assert numbers(trace(start(digit_shards, tmp_path / "b", *COMMON, *TENSORWISE, LORA, SHARED), 3)) == own


@pytest.mark.parametrize("recipe", [TENSORWISE, DELAYED], ids=["tensorwise", "delayed"])
def test_fused_weight_gradients_are_the_separate_ones(recipe, digit_shards, tmp_path):
    """They are summed over microbatches in float32, and not rounded to bfloat16 first."""
    fusion = "kernels.gradient_accumulation_fusion="
    plain = losses(digit_shards, tmp_path / "a", *COMMON, *recipe, f"{fusion}false", steps=3)
    fused = losses(digit_shards, tmp_path / "b", *COMMON, *recipe, f"{fusion}true", steps=3)
    torch.testing.assert_close(fused, plain, rtol=1e-2, atol=0)
