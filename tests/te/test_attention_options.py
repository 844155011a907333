"""Options of the attention, and a head of images: a model with Transformer Engine's layers is that with local ones."""

import pytest
import torch

from tests.gpu.test_reference_on_a_gpu import BF16, LORA, OFFLOAD, SHARED, numbers, start, trace
from tests.te.runs import COMMON, DELAYED, TENSORWISE

pytestmark = pytest.mark.gpu
OPTIONS = {
    "attention": ["model.kv_channels=32", "model.qk_layernorm=true", "model.add_qkv_bias=true"],
    "images": ["model.name=janus-tiny", "data.path=digits"],
}
LOCAL, ENGINE = "model.transformer_impl=local", "model.transformer_impl=transformer_engine"


@pytest.fixture(params=OPTIONS.values(), ids=OPTIONS)
def options(request):
    return request.param


def losses(run, steps=4):
    return torch.tensor([report.metrics["loss"] for report in trace(run, steps)])


def test_engine_layers_are_the_local_ones(options, digit_shards, tmp_path):
    """Their products of float32 are TF32."""

    def found(name, *overrides):
        return losses(start(digit_shards, tmp_path / name, *COMMON, *options, *overrides))

    torch.testing.assert_close(found("a", ENGINE), found("b", LOCAL), rtol=1e-3, atol=0)
    torch.testing.assert_close(found("c", ENGINE, BF16), found("d", LOCAL, BF16), rtol=2e-2, atol=0)


@pytest.mark.parametrize("products", [[ENGINE, BF16], TENSORWISE, DELAYED], ids=["bf16", "tensorwise", "delayed"])
@pytest.mark.parametrize("more", [[], [LORA]], ids=["whole", "adapters"])
def test_strategies_agree(products, more, options, digit_shards, tmp_path):
    common = [*COMMON, *options, *products, *more]
    resident = numbers(trace(start(digit_shards, tmp_path / "a", *common), 3))
    assert resident[1][2] > 0.0
    if products != DELAYED:
        assert resident[0][2] == 0.0
        assert numbers(trace(start(digit_shards, tmp_path / "b", *common, SHARED if more else OFFLOAD), 3)) == resident


@pytest.mark.parametrize(("saved", "resumed"), [(ENGINE, ENGINE), (ENGINE, LOCAL), (LOCAL, ENGINE)])
def test_a_run_goes_on_with_other_layers(saved, resumed, options, digit_shards, tmp_path):
    from megatron_cca.training.saving import begin_save
    from megatron_cca.training.step import train_step

    run = start(digit_shards, tmp_path / "run", *COMMON, *options, saved)
    train_step(run)
    begin_save(run)
    run.saver.finish()
    expected = [train_step(run).metrics["loss"] for _ in range(2)]
    again = start(digit_shards, tmp_path / "run", *COMMON, *options, resumed)
    assert again.iteration == 1
    found = [train_step(again).metrics["loss"] for _ in range(2)]
    assert found == pytest.approx(expected, rel=0.0 if saved == resumed else 1e-3)
