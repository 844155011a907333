"""Overlaps, fusions and CUDA graphs that a run cannot have are refused by name, and those that it can are not."""

import sys
import types

import pytest
from megatron.core.tensor_parallel import layers as megatron_layers

from megatron_cca import platform
from megatron_cca.config.load import load_config
from megatron_cca.errors import UserError
from megatron_cca.models import layers
from megatron_cca.training import computes_plainly, engine, fixed_row_length
from megatron_cca.training.checks import check_run
from megatron_cca.training.kernel_checks import check_devices, check_overlaps

TP2 = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
VPP2 = ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"]
CP2 = ["parallel.context_parallel_size=2"]
BF16, FIXED = ["training.precision=bf16"], ["data.pad_to_multiple_of=128"]
OVERLAP = [*TP2, *BF16, *FIXED, "parallel.tp_comm_overlap=true"]
GRAPHS = [*BF16, *FIXED, "kernels.cuda_graph_impl=transformer_engine"]
GATHER = ["optimizer.overlap_grad_reduce=true", "optimizer.overlap_param_gather=true"]


def refused(check, overrides, *arguments):
    config = load_config(None, overrides)
    with pytest.raises(UserError) as error:
        check(config, *arguments)
    # Else a run would not ask.
    assert not computes_plainly(config)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Where there is no run of the examples."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "world_size", "message"),
    [
        (
            ["parallel.overlap_p2p_comm=true"],
            1,
            "parallel.overlap_p2p_comm: needs parallel.virtual_pipeline_model_parallel_size of 2 or more",
        ),
        (
            ["parallel.microbatch_group_size_per_vp_stage=2"],
            1,
            "parallel.microbatch_group_size_per_vp_stage: needs parallel.virtual_pipeline_model_parallel_size of 2 or",
        ),
        (
            [*VPP2, "parallel.microbatch_group_size_per_vp_stage=9"],
            2,
            "parallel.microbatch_group_size_per_vp_stage: 9, must be from parallel.pipeline_model_parallel_size 2 to "
            "the 8 microbatches of a rank",
        ),
        (
            [*VPP2, "parallel.microbatch_group_size_per_vp_stage=1"],
            2,
            "parallel.microbatch_group_size_per_vp_stage: 1, must be from parallel.pipeline_model_parallel_size 2 to",
        ),
        (
            [*VPP2, "parallel.microbatch_group_size_per_vp_stage=7"],
            2,
            "parallel.microbatch_group_size_per_vp_stage: 7 leaves 1 of a rank's 8 microbatches for the last group, "
            "fewer than parallel.pipeline_model_parallel_size 2; 8 leaves none",
        ),
        (
            ["optimizer.overlap_param_gather=true"],
            1,
            "optimizer.overlap_param_gather: needs optimizer.overlap_grad_reduce; set that to true",
        ),
        (
            [*GATHER, "optimizer.use_distributed_optimizer=false"],
            1,
            "optimizer.overlap_param_gather: needs optimizer.use_distributed_optimizer; set that to true",
        ),
        (["optimizer.ddp_bucket_size=10"], 1, "optimizer.ddp_bucket_size: needs optimizer.overlap_grad_reduce; set"),
        (
            ["optimizer.pad_buckets_for_high_nccl_busbw=true", "optimizer.use_distributed_optimizer=false"],
            1,
            "optimizer.pad_buckets_for_high_nccl_busbw: needs optimizer.use_distributed_optimizer; set that to true",
        ),
        (
            ["optimizer.num_distributed_optimizer_instances=2", "optimizer.use_distributed_optimizer=false"],
            2,
            "optimizer.num_distributed_optimizer_instances: 2 needs optimizer.use_distributed_optimizer; set that to",
        ),
        (
            ["optimizer.num_distributed_optimizer_instances=3"],
            4,
            "optimizer.num_distributed_optimizer_instances: 3 does not divide the 4 ranks that share the weights' "
            "updates; possible: 1, 2, 4",
        ),
        (
            ["parallel.tp_comm_overlap=true"],
            1,
            "parallel.tp_comm_overlap: needs parallel.sequence_parallel and parallel.tensor_model_parallel_size of 2",
        ),
        ([*OVERLAP, "training.precision=fp32"], 2, "training.precision: fp32 has no place in the buffers of parallel"),
        ([*OVERLAP, "reference.precision=fp32"], 2, "reference.precision: fp32 has no place in the buffers of parall"),
        (
            [*OVERLAP, "model.transformer_impl=local"],
            2,
            "model.transformer_impl: parallel.tp_comm_overlap needs Transformer Engine's layers; use auto",
        ),
        ([*OVERLAP, "lora.dim=4"], 2, "parallel.tp_comm_overlap: not with lora.dim, whose adapters are no layers of"),
        ([*OVERLAP, "logging.sample_interval=1"], 2, "logging.sample_interval: draws token by token, parallel.tp_comm"),
        (
            [*OVERLAP, "data.pad_to_multiple_of=64"],
            2,
            "data.pad_to_multiple_of: 64 lets rows differ in length, parallel.tp_comm_overlap wants them alike; with "
            "model.max_position_embeddings 128 set it to 128",
        ),
        (
            [*OVERLAP, *CP2, "data.pad_to_multiple_of=1", "model.max_position_embeddings=99"],
            4,
            "data.pad_to_multiple_of: 1 lets rows differ in length, parallel.tp_comm_overlap wants them alike; with "
            "model.max_position_embeddings 99 set it to 96",
        ),
        (
            [*GRAPHS, "data.pad_to_multiple_of=1"],
            1,
            "data.pad_to_multiple_of: 1 lets rows differ in length, kernels.cuda_graph_impl wants them alike; with",
        ),
        ([*GRAPHS, "training.precision=fp32"], 1, "kernels.cuda_graph_impl: transformer_engine captures in bf16; set"),
        (
            [*GRAPHS, "objective.name=next_token", "model.hidden_dropout=0.1"],
            1,
            "model.hidden_dropout: must be 0 with kernels.cuda_graph_impl, whose random numbers do not restart with",
        ),
        (
            [*GRAPHS, "training.recompute_granularity=selective"],
            1,
            "training.recompute_granularity: selective recomputes what kernels.cuda_graph_impl has captured; leave one",
        ),
        (
            [*GRAPHS, "training.precision=fp8", "training.fp8_recipe=delayed"],
            1,
            "training.fp8_recipe: delayed settles its scales before kernels.cuda_graph_impl captures; use tensorwise",
        ),
        ([*GRAPHS, "lora.dim=4"], 1, "kernels.cuda_graph_impl: not with lora.dim, whose adapters are no layers of"),
        (
            [*GRAPHS, "kernels.cuda_graph_impl=local", "kernels.cuda_graph_modules=[attn]"],
            1,
            "kernels.cuda_graph_modules: local captures whole layers; leave it out",
        ),
        (
            ["kernels.cuda_graph_modules=[attn]"],
            1,
            "kernels.cuda_graph_modules: of no use without kernels.cuda_graph_impl; set that to transformer_engine",
        ),
        (
            ["kernels.gradient_accumulation_fusion=true", "lora.dim=4"],
            1,
            "kernels.gradient_accumulation_fusion: not with lora.dim, which freezes the weights whose gradients it",
        ),
    ],
)
def test_what_the_configuration_rules_out_is_refused(overrides, world_size, message):
    assert refused(check_run, overrides, world_size).startswith(message)


@pytest.mark.parametrize(
    ("overrides", "world_size"),
    [
        (OVERLAP, 2),
        (GRAPHS, 1),
        ([*GRAPHS, "kernels.cuda_graph_impl=local", "training.precision=fp32"], 1),
        ([*VPP2, "parallel.overlap_p2p_comm=false", "parallel.microbatch_group_size_per_vp_stage=3"], 2),
        # Seven microbatches in groups of seven, though they are no multiple of the pipeline's size.
        ([*VPP2, "parallel.microbatch_group_size_per_vp_stage=7", "training.global_batch_size=224"], 2),
        ([*GATHER, "optimizer.num_distributed_optimizer_instances=2", "parallel.context_parallel_size=2"], 2),
        (["parallel.deallocate_pipeline_outputs=true"], 1),
    ],
)
def test_what_can_be_is_let_through(overrides, world_size):
    check_run(load_config(None, ["data.path=digits", *overrides]), world_size)


def test_one_row_length_is_told_from_several():
    lengths = {m: fixed_row_length(load_config(None, [f"data.pad_to_multiple_of={m}"])) for m in (64, 65, 128, 129)}
    assert lengths == {64: None, 65: 65, 128: 128, 129: None}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parallel.tp_comm_overlap=true", "parallel.tp_comm_overlap: needs a GPU and the package transformer-engine"),
        ("kernels.apply_rope_fusion=true", "kernels.apply_rope_fusion: needs a GPU and the package transformer-engine"),
        ("kernels.cuda_graph_impl=local", "kernels.cuda_graph_impl: needs a GPU and the package transformer-engine"),
        (
            "kernels.gradient_accumulation_fusion=true",
            "kernels.gradient_accumulation_fusion: needs a GPU and Transformer Engine's layers, or apex with fused_we",
        ),
    ],
)
def test_what_needs_a_gpu_is_refused_without_one(override, message):
    assert refused(check_devices, [override]).startswith(message)


def test_gradients_are_fused_by_the_layers_or_by_apex(monkeypatch):
    wanted = ["kernels.gradient_accumulation_fusion=true"]
    monkeypatch.setattr(platform, "current", lambda: types.SimpleNamespace(is_cuda=True))
    monkeypatch.setattr(layers, "HAVE_TE", True)
    check_devices(load_config(None, wanted))
    assert refused(check_devices, [*wanted, "model.transformer_impl=local"]).startswith("kernels.gradient_accumulation")
    monkeypatch.setattr(megatron_layers, "_grad_accum_fusion_available", True)
    check_devices(load_config(None, [*wanted, "model.transformer_impl=local"]))


def test_a_frozen_model_has_no_gradients_to_fuse_and_is_not_captured(monkeypatch):
    monkeypatch.setattr(megatron_layers, "_grad_accum_fusion_available", True)
    wanted = load_config(None, ["kernels.gradient_accumulation_fusion=true", "kernels.cuda_graph_impl=local"]).kernels
    trained = layers.kernel_options(wanted, is_frozen=False)
    frozen = layers.kernel_options(wanted, is_frozen=True)
    assert (trained["gradient_accumulation_fusion"], trained["cuda_graph_impl"]) == (True, "local")
    assert (frozen["gradient_accumulation_fusion"], frozen["cuda_graph_impl"]) == (False, "none")
    assert layers.forward_kernels(wanted) == {name: frozen[name] for name in layers.forward_kernels(wanted)}
    engine_layer = types.SimpleNamespace(fuse_wgrad_accumulation=False)
    model = types.SimpleNamespace(modules=lambda: [engine_layer, types.SimpleNamespace()])
    layers.fuse_weight_gradients(model, wanted, is_frozen=True)
    assert not engine_layer.fuse_wgrad_accumulation
    layers.fuse_weight_gradients(model, wanted, is_frozen=False)
    assert engine_layer.fuse_wgrad_accumulation


def test_user_buffers_hold_a_microbatch_of_every_precision_there_is(monkeypatch):
    made = []
    base = types.ModuleType("transformer_engine.pytorch.module.base")
    base.initialize_ub = lambda **arguments: made.append(arguments)
    base.UserBufferQuantizationMode = types.SimpleNamespace(FP8="fp8", NONE="none")
    package = types.ModuleType("transformer_engine.pytorch.module")
    package.base = base
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch.module", package)
    monkeypatch.setattr(engine, "_have_been_made", False)
    engine.initialize_user_buffers(load_config(None, []))
    assert made == []
    mixed = [*OVERLAP, "reference.precision=fp8", "parallel.context_parallel_size=2", "training.micro_batch_size=4"]
    for _ in range(2):
        engine.initialize_user_buffers(load_config(None, mixed))
    # Pairs are two rows a sample; each of two context-parallel ranks has half of every row.
    assert made == [
        {
            "shape": [128 * 8 // 2, 64],
            "tp_size": 2,
            "quantization_modes": ["fp8", "none"],
            "bootstrap_backend": "nccl",
        }
    ]


@pytest.mark.parametrize(
    "setting",
    [
        "kernels.bias_activation_fusion=true",
        "kernels.bias_dropout_fusion=true",
        "kernels.apply_rope_fusion=true",
        "kernels.cuda_graph_impl=local",
        "kernels.cuda_graph_impl=transformer_engine",
        "parallel.tp_comm_overlap=true",
    ],
)
def test_kernels_that_layers_of_next_scale_prediction_do_not_have_are_refused(setting):
    with pytest.raises(UserError) as error:
        check_overlaps(load_config(None, ["model.name=var-tiny", setting]), 1)
    key, _, value = setting.partition("=")
    assert str(error.value) == f"{key}: the layers of var-tiny cannot have it; leave it out"
    if value == "true":
        check_overlaps(load_config(None, ["model.name=var-tiny", f"{key}=false"]), 1)
