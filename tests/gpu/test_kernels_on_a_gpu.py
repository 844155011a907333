"""One GPU: each switch of ``kernels`` against the run without it. ``parallel.tp_comm_overlap`` would need two."""

import pytest
import torch

from tests.gpu.test_reference_on_a_gpu import start
from tests.gpu.test_training_on_a_gpu import train
from tests.references.drawn_digits import shards_of_digits

pytestmark = pytest.mark.gpu
STEPS = 8
FUSED_POSITIONS = pytest.mark.needs_hardware("the kernel of rotary positions")
GRAPHS = pytest.mark.needs_hardware("graphs")
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
        pytest.param("kernels.apply_rope_fusion=true", marks=FUSED_POSITIONS),
        "kernels.gradient_accumulation_fusion=true",
        pytest.param("kernels.cuda_graph_impl=transformer_engine", marks=GRAPHS),
        # Last: Megatron's capture moves the process to a stream of its own.
        pytest.param("kernels.cuda_graph_impl=local", marks=GRAPHS),
    ],
)
def test_a_switch_changes_the_loss_by_rounding_alone(override, plain, digit_shards, tmp_path):
    torch.testing.assert_close(losses(digit_shards, tmp_path, override), plain, rtol=2e-2, atol=0)


def validated(digit_shards, folder, *overrides):
    """The loss of each step and of the validation after it."""
    from megatron.core.transformer.cuda_graphs import delete_cuda_graphs

    from megatron_cca.training.step import train_step, validate

    held_out = ["validation.interval=1", "validation.fraction=0.1", "validation.iters=2"]
    run = start(digit_shards, folder, *COMMON, *held_out, *overrides)
    found = [(train_step(run).metrics["loss"], validate(run)["loss"]) for _ in range(STEPS)]
    delete_cuda_graphs()
    return torch.tensor(found)


@GRAPHS
@pytest.mark.parametrize("implementation", ["transformer_engine", "local"])
def test_validation_after_a_capture_is_that_of_a_plain_run(implementation, digit_shards, tmp_path):
    """It runs captured layers without gradients and not in training; the steps after it are as they would be."""
    pytest.importorskip("transformer_engine.pytorch")
    plain = validated(digit_shards, tmp_path / "plain")
    captured = validated(digit_shards, tmp_path / "captured", f"kernels.cuda_graph_impl={implementation}")
    torch.testing.assert_close(captured, plain, rtol=2e-2, atol=0)


@GRAPHS
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
    from megatron_cca.config.load import load_config
    from megatron_cca.models import resolve_architecture

    vocabulary = resolve_architecture(load_config(None, ["model.name=llamagen-tiny"]).model).vocabulary
    return shards_of_digits(vocabulary, tmp_path_factory.mktemp("data") / "digits_classes")


# Only a GPU captures; tests/unit/test_graph_hooks.py asks on a CPU what Megatron asks before a replay.
@GRAPHS
@pytest.mark.parametrize("impl", ["transformer_engine", "local"])
def test_graphs_of_a_model_with_positions_on_a_grid_change_the_loss_by_rounding_alone(impl, class_shards, tmp_path):
    pytest.importorskip("transformer_engine.pytorch")
    model = "model.name=llamagen-tiny"
    without = losses(class_shards, tmp_path / "without", model)
    captured = losses(class_shards, tmp_path / "captured", model, f"kernels.cuda_graph_impl={impl}")
    torch.testing.assert_close(captured, without, rtol=2e-2, atol=0)
