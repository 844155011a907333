"""One GPU: each switch of ``kernels`` against the run without it. ``parallel.tp_comm_overlap`` would need two."""

import pytest
import torch

from tests.gpu.test_training_on_a_gpu import train

pytestmark = pytest.mark.gpu
STEPS = 8
# One length for all rows, and a layer's sizes that graphs and kernels of half precision take.
COMMON = ["training.precision=bf16", "data.pad_to_multiple_of=128", "training.micro_batch_size=2"]


def losses(digit_shards, folder, *overrides):
    from megatron.core.transformer.cuda_graphs import delete_cuda_graphs

    reports = train(digit_shards, folder, STEPS, *COMMON, *overrides)
    delete_cuda_graphs()
    assert reports[0].log_ratio.worst == 0.0
    return torch.tensor([report.metrics["loss"] for report in reports])


@pytest.fixture(scope="module")
def plain(digit_shards, tmp_path_factory):
    pytest.importorskip("transformer_engine.pytorch")
    return losses(digit_shards, tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize(
    "override",
    [
        "kernels.bias_activation_fusion=false",
        "kernels.bias_dropout_fusion=false",
        "kernels.apply_rope_fusion=true",
        "kernels.gradient_accumulation_fusion=true",
        "kernels.cuda_graph_impl=transformer_engine",
        # Last: Megatron's capture moves the process to a stream of its own.
        "kernels.cuda_graph_impl=local",
    ],
)
def test_a_switch_changes_the_loss_by_rounding_alone(override, plain, digit_shards, tmp_path):
    torch.testing.assert_close(losses(digit_shards, tmp_path, override), plain, rtol=2e-2, atol=0)


def test_graphs_are_captured_at_all(digit_shards, tmp_path, monkeypatch):
    pytest.importorskip("transformer_engine.pytorch")
    from megatron.core.transformer.cuda_graphs import TECudaGraphHelper

    captured, capture = [], TECudaGraphHelper.create_cudagraphs

    def spy(helper):
        capture(helper)
        captured.append(helper.graphs_created())

    monkeypatch.setattr(TECudaGraphHelper, "create_cudagraphs", spy)
    losses(digit_shards, tmp_path, "kernels.cuda_graph_impl=transformer_engine")
    assert captured == [True]


@pytest.fixture(scope="module")
def class_shards(tmp_path_factory):
    from megatron_cca.config_files import load_config
    from megatron_cca.data.digits import ensure_digit_shards
    from megatron_cca.models import resolve_architecture

    vocabulary = resolve_architecture(load_config(None, ["model.name=llamagen-tiny"]).model).vocabulary
    return ensure_digit_shards(vocabulary, tmp_path_factory.mktemp("data") / "digits_classes")


# Only a GPU captures; tests/unit/test_graph_hooks.py asks on a CPU what Megatron asks before a replay.
@pytest.mark.parametrize("impl", ["transformer_engine", "local"])
def test_graphs_of_a_model_with_positions_on_a_grid_change_the_loss_by_rounding_alone(impl, class_shards, tmp_path):
    pytest.importorskip("transformer_engine.pytorch")
    model = "model.name=llamagen-tiny"
    without = losses(class_shards, tmp_path / "without", model)
    captured = losses(class_shards, tmp_path / "captured", model, f"kernels.cuda_graph_impl={impl}")
    torch.testing.assert_close(captured, without, rtol=2e-2, atol=0)
