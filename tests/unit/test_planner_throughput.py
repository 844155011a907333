"""The time model's arithmetic: parts, bubbles, scaling, what each switch hides."""

from dataclasses import replace

import pytest

from megatron_cca.config.load import load_config
from megatron_cca.errors import UserError
from megatron_cca.lab.planner.costs import Group
from megatron_cca.lab.planner.hardware import (
    DEFAULT,
    GPUS,
    Calibration,
    Cluster,
    calibration_json,
    gpu_named,
    read_calibration,
)
from megatron_cca.lab.planner.throughput import PARTS, predict_step
from megatron_cca.lab.planner.workload import Workload

H100 = GPUS["h100-80gb"]
IMAGES = Workload(8448, 8100)
# Nothing but the layers takes time on such data.
NO_IMAGES = Workload(8448, 0)
FREE_LINKS = replace(H100, nvlink_bandwidth=1e30, network_bandwidth=1e30)
EMU3 = ["model.name=emu3-8b", "training.precision=bf16", "training.micro_batch_size=1"]


def predict(*overrides, gpus=8, gpu=H100, workload=IMAGES, calibration=DEFAULT):
    config = load_config(None, [*EMU3, *overrides])
    return predict_step(config, Cluster(gpu, gpus, 8), workload, calibration)


def test_the_parts_add_up():
    step = predict()
    assert len(PARTS) == 12
    assert sum(step.parts.values()) == pytest.approx(step.total)
    assert step.low < step.total < step.high
    assert step.samples_per_second == pytest.approx(256 / step.total)
    # Two rows a sample.
    assert step.tokens_per_second_per_gpu == pytest.approx(2 * 256 * 8448 / 8 / step.total)
    assert step.mfu == pytest.approx(step.model_flops_per_gpu / step.total / 989.5e12)


@pytest.mark.parametrize(("stages", "chunks", "batch"), [(2, 1, 16), (4, 1, 32), (4, 2, 32), (8, 4, 64)])
def test_the_bubble_is_that_of_the_schedule(stages, chunks, batch):
    """Narayanan et al. (arXiv 2104.04473): (p - 1) / (m v) of the ideal time, where stages have equally much to do."""
    nothing = replace(DEFAULT, microbatch_overhead_seconds=0, collective_latency_seconds=0)
    keys = {
        "parallel.pipeline_model_parallel_size": stages,
        "parallel.virtual_pipeline_model_parallel_size": chunks,
        "training.global_batch_size": batch,
    }
    overrides = [f"{key}={value}" for key, value in keys.items()]
    step = predict(*overrides, gpus=stages, gpu=FREE_LINKS, workload=NO_IMAGES, calibration=nothing)
    ideal = step.compute + step.reference
    assert step.bubble / ideal == pytest.approx((stages - 1) / (batch * chunks), rel=1e-6)


def test_the_last_stage_has_the_head_alone():
    whole = predict("parallel.pipeline_model_parallel_size=8", gpus=8)
    single = predict(gpus=1)
    assert whole.head == pytest.approx(single.head)
    assert whole.compute == pytest.approx(single.compute / 8)


@pytest.mark.parametrize("layout", [[], ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]])
def test_more_gpus_with_as_much_work_each_are_never_slower_in_all(layout):
    speeds = [
        predict(*layout, f"training.global_batch_size={4 * gpus}", gpus=gpus).samples_per_second
        for gpus in (8, 16, 64, 512, 4096)
    ]
    assert speeds == sorted(speeds)


@pytest.mark.parametrize("layout", [[], ["parallel.tensor_model_parallel_size=4"]])
def test_more_gpus_with_the_same_batch_are_never_slower(layout):
    seconds = [predict(*layout, gpus=gpus).total for gpus in (8, 16, 32, 64, 128, 256)]
    assert seconds == sorted(seconds, reverse=True)


@pytest.mark.parametrize(
    ("switch", "part", "layout"),
    [
        ("parallel.tp_comm_overlap=true", "tensor_parallel", ["parallel.tensor_model_parallel_size=8"]),
        ("optimizer.overlap_grad_reduce=true", "data_parallel", []),
        ("optimizer.overlap_param_gather=true", "data_parallel", []),
        ("optimizer.grad_reduce_in_fp32=false", "data_parallel", []),
        (
            "parallel.virtual_pipeline_model_parallel_size=2",
            "pipeline",
            ["parallel.pipeline_model_parallel_size=8"],
        ),
        ("reference.strategy=cached", "reference", []),
        ("kernels.apply_rope_fusion=true", "compute", ["kernels.apply_rope_fusion=false"]),
        ("kernels.gradient_accumulation_fusion=true", "compute", []),
        ("training.logps_chunk_size=4096", "head", ["training.logps_chunk_size=1024"]),
    ],
)
def test_what_each_switch_saves(switch, part, layout):
    before, after = predict(*layout), predict(*layout, switch)
    assert getattr(after, part) < getattr(before, part)
    for other in {*PARTS} - {part, "bubble"}:
        assert getattr(after, other) <= getattr(before, other) * 1.0001


def test_what_recomputation_costs():
    none = predict()
    attention, mlp, both, full, block = (
        predict(f"training.recompute_granularity={granularity}", *keys)
        for granularity, keys in (
            ("selective", []),
            ("selective", ["training.recompute_modules=[mlp]"]),
            ("selective", ["training.recompute_modules=[core_attn, mlp]"]),
            ("full", []),
            ("full", ["training.recompute_method=block", "training.recompute_num_layers=8"]),
        )
    )
    assert none.recompute == 0 < attention.recompute < mlp.recompute < both.recompute < full.recompute
    assert both.recompute == pytest.approx(attention.recompute + mlp.recompute)
    assert block.recompute == pytest.approx(full.recompute / 4)
    # A third of forward and backward, less attention's and the update's share.
    assert full.recompute == pytest.approx(full.compute / 3, rel=0.1)


def test_a_streamed_reference_waits_for_the_host_where_it_computes_little():
    resident, offloaded = predict(), predict("reference.strategy=offload")
    assert offloaded.reference == pytest.approx(resident.reference)
    short = Workload(128, 100)
    slow = predict("reference.strategy=offload", workload=short).reference / predict(workload=short).reference
    assert slow > 5


def test_a_rank_of_lora_has_neither_update_nor_gradients_to_send():
    step = predict("lora.dim=16", "reference.strategy=shared")
    assert step.data_parallel == step.optimizer == 0
    assert step.compute < predict().compute


def group(size, stride, gpus_per_node=8):
    return Group(size, stride, Cluster(H100, 512, gpus_per_node), DEFAULT)


def test_where_groups_lie():
    assert group(8, 1).is_within_a_node
    assert not group(8, 2).is_within_a_node
    assert group(64, 1).ranks_per_node == 8
    assert group(64, 8).ranks_per_node == 1
    # Each of eight ranks of a node has its own network card; a single one has one.
    assert group(64, 8).collective(1e9) > 6 * group(64, 1).collective(1e9)
    assert group(1, 1).collective(1e9) == group(1, 1).send(1e9) == 0


def test_precisions_that_a_gpu_lacks():
    with pytest.raises(UserError, match=r"^training\.precision: a100-80gb computes no fp8; use fp32 or bf16$"):
        predict("training.precision=fp8", gpu=GPUS["a100-80gb"])


def test_unknown_gpus():
    with pytest.raises(UserError, match=r"^--gpu: 'v100' is unknown; known: a100-40gb, a100-80gb, h100-80gb, h200"):
        gpu_named("v100")


def test_calibrations_are_of_one_gpu(tmp_path):
    path = tmp_path / "calibration.json"
    measured = Calibration(matmul_efficiency=0.6, gpu="h200")
    path.write_text(calibration_json(measured, GPUS["h200"], date="today"))
    assert read_calibration(path, "h200") == (measured, GPUS["h200"])
    with pytest.raises(UserError, match="measured on h200, not on h100-80gb; calibrate there, or leave it out"):
        read_calibration(path, "h100-80gb")


GOOD = calibration_json(Calibration(gpu="h200"), GPUS["h200"])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "damaged"),
        ("[]", "damaged"),
        ("{}", "not what megatron-cca plan calibrate writes"),
        (GOOD.replace("0.7,", '"much",'), "matmul_efficiency must be a positive number, found 'much'"),
        (GOOD.replace("0.7,", "0,"), "must be a positive number, found 0"),
        (GOOD.replace("0.7,", "NaN,"), "must be a positive number, found nan"),
        (GOOD.replace('"fp8": 1979', '"fp8": -1979'), "flops must be positive"),
        (GOOD.replace('"nvlink_bandwidth"', '"nvlink"'), "not what megatron-cca plan calibrate writes"),
    ],
)
def test_damaged_calibrations(tmp_path, text, problem):
    path = tmp_path / "calibration.json"
    path.write_text(text)
    assert text != GOOD
    with pytest.raises(UserError, match=rf"^--calibration:? .*calibration.json.*{problem}"):
        read_calibration(path, "h200")


def test_a_missing_calibration(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_calibration(tmp_path / "none.json", "h200")
