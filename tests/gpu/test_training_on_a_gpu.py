"""One GPU: training with Transformer Engine's layers and with the local ones, in fp32 and bf16."""

import pytest
import torch

from megatron_cca.config.load import load_config
from tests.distributed.test_layout_parity import CCA

pytestmark = pytest.mark.gpu


def train(digit_shards, folder, steps, *overrides):
    from megatron_cca.parallel.ranks import initialize_distributed
    from megatron_cca.training.batches import open_data
    from megatron_cca.training.setup import set_up
    from megatron_cca.training.step import train_step

    config = load_config(None, [*CCA, f"data.path={digit_shards}", f"training.output_dir={folder}", *overrides])
    initialize_distributed(config)
    run = set_up(config, open_data(config))
    return [train_step(run) for _ in range(steps)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("implementation", ["local", "transformer_engine"])
def test_the_first_log_ratio_is_exactly_0_and_the_loss_falls(precision, implementation, digit_shards, tmp_path):
    if implementation == "transformer_engine":
        pytest.importorskip("transformer_engine.pytorch")
    overrides = [f"training.precision={precision}", f"model.transformer_impl={implementation}"]
    reports = train(digit_shards, tmp_path, 50, *overrides)
    assert reports[0].log_ratio.worst == 0.0
    losses = torch.tensor([report.metrics["loss"] for report in reports])
    assert losses[-10:].mean() < losses[:10].mean()


def test_transformer_engine_agrees_with_the_local_layers(digit_shards, tmp_path):
    """To what TF32 leaves: Transformer Engine multiplies float32 with 10 bits of mantissa."""
    pytest.importorskip("transformer_engine.pytorch")
    traces = [
        [report.metrics["loss"] for report in train(digit_shards, tmp_path, 10, f"model.transformer_impl={name}")]
        for name in ("local", "transformer_engine")
    ]
    torch.testing.assert_close(torch.tensor(traces[1]), torch.tensor(traces[0]), rtol=1e-2, atol=0)
