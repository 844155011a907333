"""What the planner says a rank holds and sends, against real ranks and against one another.

The oracle is a real job on gloo ranks, whose tensors are counted as they are made. Held all the time must agree to the
byte, peaks within a tenth.
"""

from __future__ import annotations

import itertools
import json

import pytest

from megatron_cca.config.load import config_to_dict, load_config
from megatron_cca.lab.planner.candidates import SearchInputs, check_candidate
from megatron_cca.lab.planner.hardware import Cluster, gpu_named
from megatron_cca.lab.planner.memory import predict_memory
from megatron_cca.lab.planner.search import search
from megatron_cca.lab.planner.workload import ImageShape, Workload
from tests.distributed.launch import ROOT, run_tool, run_workers
from tests.selection import Computed, mostly_full

TINY = ROOT / "examples" / "emu3_tiny_cca.yaml"
BIG = ROOT / "examples" / "emu3_8b_cca.yaml"
LARGE_SCALES = ROOT / "examples" / "var_d30_cca.yaml"
WORKLOAD = Workload(24, 16)
HELD = {"parameters": "weights", "reference": "reference", "gradients": "gradients", "optimizer": "optimizer"}

TP2 = ["parallel.tensor_model_parallel_size=2"]
PP2 = ["parallel.pipeline_model_parallel_size=2"]
VPP2 = [*PP2, "parallel.virtual_pipeline_model_parallel_size=2"]
BF16 = ["training.precision=bf16"]
GRID = ["model.name=llamagen-tiny"]
SCALES = ["model.name=var-tiny"]
IMAGES = ["model.name=janus-tiny"]
MIXTURE = ["objective.name=gft"]
FULL = ["training.recompute_granularity=full"]
SELECTIVE = ["training.recompute_granularity=selective"]
WIDE_HEADS = ["model.kv_channels=64", "model.qk_layernorm=true", "model.add_qkv_bias=true"]
OVERLAP = ["optimizer.overlap_grad_reduce=true", "optimizer.overlap_param_gather=true"]

REAL = {
    "dp2": (2, OVERLAP),
    "dp4": (4, BF16),
    "tp2, wide heads": (2, [*TP2, *WIDE_HEADS]),
    "vpp2 x dp2": (4, VPP2),
    "scales, dp2": (2, [*SCALES, *BF16, *OVERLAP]),
    "scales, tp2 without sequence parallelism": (2, [*SCALES, *BF16, *TP2]),
    "scales, core attention again": (1, [*SCALES, *SELECTIVE, "training.recompute_modules=[core_attn]"]),
    "mixture": (1, MIXTURE),
    "mixture, tp2": (2, [*MIXTURE, *TP2, *BF16, "parallel.sequence_parallel=true"]),
    "scales, mixture": (1, [*SCALES, *MIXTURE]),
}

# Ranks, keys, which ranks to be.
FAKE = {
    "tp2 without sequence parallelism": (2, TP2, [0]),
    "pp2 x tp2 x vpp2": (8, [*TP2, *VPP2], [0, 7]),
    "cp2": (2, ["parallel.context_parallel_size=2"], [0, 1]),
    "cp2, positions on a grid": (2, [*GRID, "parallel.context_parallel_size=2"], [0, 1]),
    "cp2, wide heads": (2, ["parallel.context_parallel_size=2", *BF16, *WIDE_HEADS, "reference.fp8_param=true"], [0]),
    "full recomputation": (1, FULL, [0]),
    "full recomputation, positions on a grid": (1, [*GRID, *FULL], [0]),
    "two layers at a time": (1, [*FULL, "training.recompute_num_layers=2"], [0]),
    "two layers of four": (1, [*FULL, "training.recompute_method=block", "training.recompute_num_layers=2"], [0]),
    "mlp again": (1, [*SELECTIVE, "training.recompute_modules=[mlp]"], [0]),
    "core attention again": (1, [*SELECTIVE, "training.recompute_modules=[core_attn]"], [0]),
    "offloaded": (1, [*FULL, "reference.strategy=offload"], [0]),
    "fp8 weights": (1, [*BF16, "reference.fp8_param=true"], [0]),
    "adapters": (1, ["reference.strategy=shared", "lora.dim=4"], [0]),
    "plain optimizer": (2, [*BF16, "optimizer.use_distributed_optimizer=false"], [1]),
    "buckets": (4, [*OVERLAP, "optimizer.ddp_bucket_size=20000"], [0, 1, 2, 3]),
    "two optimizers": (
        4,
        [*BF16, "optimizer.num_distributed_optimizer_instances=2", "optimizer.pad_buckets_for_high_nccl_busbw=true"],
        [0, 3],
    ),
    "likelihood": (1, ["objective.name=next_token"], [0]),
    "mixture, full recomputation": (1, [*MIXTURE, *FULL], [0]),
    "mixture, pp2": (2, [*MIXTURE, *PP2], [0, 1]),
    "images, tp2 without sequence parallelism": (2, [*IMAGES, *TP2], [0]),
    "images, full recomputation": (1, [*IMAGES, *FULL], [0]),
    "images, offloaded": (1, [*IMAGES, *FULL, "reference.strategy=offload"], [0]),
    "images, fp8 weights": (1, [*IMAGES, *BF16, "reference.fp8_param=true"], [0]),
    "images, adapters": (1, [*IMAGES, "reference.strategy=shared", "lora.dim=4"], [0]),
    "images, mixture": (1, [*IMAGES, *MIXTURE], [0]),
    "scales, full recomputation": (1, [*SCALES, *FULL], [0]),
    "scales, two layers of three": (
        1,
        [*SCALES, *FULL, "training.recompute_method=block", "training.recompute_num_layers=2"],
        [0],
    ),
    "scales, mlp again": (1, [*SCALES, *SELECTIVE, "training.recompute_modules=[mlp]"], [0]),
    "scales, mlp and core attention again": (
        1,
        [*SCALES, *BF16, *SELECTIVE, "training.recompute_modules=[mlp,core_attn]"],
        [0],
    ),
    "scales, offloaded": (1, [*SCALES, *FULL, "reference.strategy=offload"], [0]),
    "scales, adapters": (1, [*SCALES, "reference.strategy=shared", "lora.dim=4"], [0]),
    "scales, adapters, full recomputation": (1, [*SCALES, *FULL, "reference.strategy=shared", "lora.dim=4"], [0]),
    "scales, plain optimizer": (2, [*SCALES, *BF16, "optimizer.use_distributed_optimizer=false"], [1]),
    "scales, buckets": (4, [*SCALES, *OVERLAP, "optimizer.ddp_bucket_size=20000"], [0, 1, 2, 3]),
    "scales, likelihood": (1, [*SCALES, "objective.name=next_token"], [0]),
}

# Two of the 8B model's layers, as a GPU would have them.
WIDE = ["model.num_layers=2", "parallel.tensor_model_parallel_size=4", "training.global_batch_size=2"]
LIKE_GPU = {
    "tp4": (4, WIDE, [0]),
    "tp4, last stage": (8, [*WIDE, *PP2], [7]),
    "tp4, recomputed": (4, [*WIDE, *FULL], [0]),
    "tp4, fp8 reference": (4, [*WIDE, *FULL, "reference.fp8_param=true"], [0]),
    "tp4, SwiGLU by parts": (4, [*WIDE, "kernels.bias_activation_fusion=false"], [0]),
    "tp4, mixture": (4, [*WIDE, *FULL, *MIXTURE], [0]),
    "tp4 x cp2": (8, [*WIDE, "parallel.context_parallel_size=2"], [0]),
    "tp4, wide heads": (4, [*WIDE, *WIDE_HEADS, "model.kv_channels=512"], [0]),
}
WIDE_WORKLOAD = Workload(8448, 8100)
# Three of the largest VAR's, as a GPU would have them.
LARGE = ["model.num_layers=3", "training.global_batch_size=32"]
SHARED = [*TP2, "parallel.sequence_parallel=true"]
SCALES_LIKE_GPU = {
    "large scales": (1, LARGE, [0]),
    "large scales, recomputed": (1, [*LARGE, *FULL], [0]),
    "large scales, tp2": (2, [*LARGE, *SHARED], [0]),
    "large scales, tp2, recomputed": (2, [*LARGE, *SHARED, *FULL], [0]),
    "large scales, offloaded": (1, [*LARGE, *FULL, "reference.strategy=offload"], [0]),
    "large scales, fp8 reference": (1, [*LARGE, "reference.fp8_param=true"], [0]),
}
SCALES_WORKLOAD = Workload(680, 680)


def run_of(name):
    """Return the configuration, the rows, and whether to count as on a GPU."""
    if name in SCALES_LIKE_GPU:
        return LARGE_SCALES, SCALES_WORKLOAD, True
    return (BIG, WIDE_WORKLOAD, True) if name in LIKE_GPU else (TINY, WORKLOAD, False)


# One of each kind of formula.
KEPT = {
    *("vpp2 x dp2", "tp2, wide heads", "tp4, wide heads"),
    *("cp2, positions on a grid", "full recomputation, positions on a grid", "two layers of four", "mlp again"),
    *("offloaded", "fp8 weights", "adapters", "plain optimizer", "buckets", "likelihood", "tp4", "tp4, fp8 reference"),
    *("mixture", "tp4, mixture"),
    *("images, full recomputation", "images, offloaded"),
    *("scales, dp2", "scales, core attention again", "scales, full recomputation", "scales, mlp again"),
    *("scales, offloaded", "scales, adapters", "scales, buckets", "large scales", "large scales, tp2, recomputed"),
}


# How many microbatches a replica of the tiny model has in a step; None is the example's own number.
TWO, ALL = 2, None


def overrides_of(path, overrides, ranks=1, microbatches=ALL):
    """Return the configuration of a run on so many ranks, from random weights."""
    common = ["training.pretrained_checkpoint=null", *overrides]
    if microbatches is not ALL and path == TINY:
        parallel = load_config(path, common).parallel
        stages, sizes = parallel.pipeline_model_parallel_size, parallel.tensor_model_parallel_size
        replicas = ranks // (stages * sizes * parallel.context_parallel_size)
        common.append(f"training.global_batch_size={microbatches * 32 * replicas}")
    return {"config": str(path), "overrides": common}


def predicted(path, overrides, ranks, rank, workload, on_gpu, microbatches):
    config = load_config(path, overrides_of(path, overrides, ranks, microbatches)["overrides"])
    per_stage = ranks // config.parallel.pipeline_model_parallel_size
    return predict_memory(
        config,
        ranks,
        workload,
        on_gpu=on_gpu,
        pipeline_rank=rank // per_stage,
        sharing_rank=rank % per_stage // config.parallel.tensor_model_parallel_size,
    )


def seen_by_tensors(estimate, on_gpu):
    """The estimate without what no tensor shows."""
    return estimate.total - (estimate.overhead + estimate.communication if on_gpu else 0)


def assert_agrees(counted, estimate, on_gpu):
    assert {name: counted[name] for name in HELD} == {name: getattr(estimate, HELD[name]) for name in HELD}
    assert seen_by_tensors(estimate, on_gpu) == pytest.approx(counted["peak"], rel=0.1)


def in_make_test(case):
    return case[0] in KEPT and case[1] is TWO


@pytest.mark.parametrize(("name", "microbatches"), mostly_full(itertools.product(REAL, (TWO, ALL)), in_make_test))
def test_real_ranks_hold_what_is_predicted_and_what_the_dry_run_counts(name, microbatches, tmp_path):
    ranks, overrides = REAL[name]
    assert_held(overrides, ranks, WORKLOAD, microbatches, tmp_path)


def assert_held(overrides, ranks, workload, microbatches, folder):
    """Hold the prediction and the dry run of a run of tiny sizes to real ranks."""
    settings = {**overrides_of(TINY, overrides, ranks, microbatches)}
    settings["workload"] = [workload.seq_length, workload.image_tokens]
    real = run_workers(ranks, "timing_workers.counted_steps", settings, folder)
    jobs = [{**settings, "ranks": ranks, "rank": rank, "like_gpu": False} for rank in range(ranks)]
    fakes = run_workers(1, "timing_workers.dry_runs", {"jobs": jobs}, folder)
    for rank, (counted, fake) in enumerate(zip(real, fakes, strict=True)):
        assert_agrees(counted, predicted(TINY, overrides, ranks, rank, workload, False, microbatches), on_gpu=False)
        for key in (*HELD, "peak", "activations"):
            assert fake[key] == counted[key], key
        # What ranks tell each other in words has no size until it is said.
        assert sent(fake) == {key: sizes for key, sizes in sent(counted).items() if key[1] != "broadcast"}


def sent(counted):
    return {
        (one["group"], one["operation"], one["phase"]): (one["calls"], one["num_bytes"]) for one in counted["traffic"]
    }


@pytest.fixture(scope="module")
def fakes(tmp_path_factory):
    """Return, by name and microbatches, what each rank holds and sends."""
    folder = tmp_path_factory.mktemp("dry")

    def count(case):
        name, microbatches = case
        ranks, overrides, which = (FAKE | LIKE_GPU | SCALES_LIKE_GPU)[name]
        path, workload, on_gpu = run_of(name)
        common = overrides_of(path, overrides, ranks, microbatches) | {"ranks": ranks, "like_gpu": on_gpu}
        common["workload"] = [workload.seq_length, workload.image_tokens]
        jobs = [common | {"rank": rank} for rank in which]
        return {case: run_workers(1, "timing_workers.dry_runs", {"jobs": jobs}, folder)}

    return Computed(count)


# Those of the large models have their number in any case.
CASES = [*itertools.product(FAKE, (TWO, ALL)), *((name, TWO) for name in (*LIKE_GPU, *SCALES_LIKE_GPU))]


@pytest.mark.parametrize(("name", "microbatches"), mostly_full(CASES, in_make_test))
def test_the_formulas_are_the_dry_run_within_a_tenth(fakes, name, microbatches):
    ranks, overrides, which = (FAKE | LIKE_GPU | SCALES_LIKE_GPU)[name]
    path, workload, on_gpu = run_of(name)
    for rank, counted in zip(which, fakes[name, microbatches], strict=True):
        assert_agrees(counted, predicted(path, overrides, ranks, rank, workload, on_gpu, microbatches), on_gpu)


def test_the_head_of_a_mixture_holds_what_is_predicted_beside_that_of_pairs(tmp_path):
    """Layers are made small, so that the head has the peak, and weights, which are most of it, are left out."""
    counted, foretold = {}, {}
    for objective in ("gft", "cca"):
        overrides = [f"objective.name={objective}", *WIDE, *FULL, "model.ffn_hidden_size=1024"]
        job = overrides_of(BIG, overrides) | {"ranks": 4, "rank": 0, "like_gpu": True, "workload": [8448, 8100]}
        (found,) = run_workers(1, "timing_workers.dry_runs", {"jobs": [job]}, tmp_path)
        estimate = predicted(BIG, overrides, 4, 0, WIDE_WORKLOAD, True, TWO)
        assert estimate.head > estimate.activations
        counted[objective], foretold[objective] = found["activations"], estimate.head + estimate.activations
    assert foretold["gft"] - foretold["cca"] == pytest.approx(counted["gft"] - counted["cca"], rel=0.1)


def test_collectives_have_the_bytes_of_their_tensors(fakes):
    (counted,) = fakes["tp4", TWO]
    stream, layers, microbatches = 2 * 8448 * 4096 * 2, 2, 2
    # A layer gathers at attention and at the MLP, and the head once more.
    assert sent(counted)["tensor", "all_gather", "reference pass"] == (
        (2 * layers + 1) * microbatches,
        (2 * layers + 1) * microbatches * stream,
    )


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.num_layers=2"],
        [*SCALES, *FULL, "reference.strategy=offload"],
        pytest.param(["model.num_layers=4"], marks=pytest.mark.full),
    ],
)
def test_a_step_of_many_microbatches_is_continued_from_a_few(overrides, tmp_path):
    # Some are run, then what the last one added is counted again; all eight, and one by one.
    job = {
        **overrides_of(TINY, overrides),
        "workload": [24, 16],
        "ranks": 1,
        "rank": 0,
        "like_gpu": False,
    }
    few, all_of_them = run_workers(1, "timing_workers.dry_runs", {"jobs": [job, job | {"run_all": True}]}, tmp_path)
    # But for some bytes of numbers that wait for the step's report.
    assert few["peaks"] == pytest.approx(all_of_them["peaks"], rel=1e-4)
    assert few | {"peaks": None} == all_of_them | {"peaks": None}


def dry(*arguments, tmp_path):
    return run_tool(ROOT / "tools" / "plan.py", "dry-run", "--config", *arguments, cwd=tmp_path)


def test_any_rank_of_the_largest_job(tmp_path):
    settings = ["--set", "parallel.pipeline_model_parallel_size=8", "--set", "training.global_batch_size=4096"]
    settings += ["--set", "model.num_layers=8", "--output", "rank.json"]
    done = dry(BIG, "--gpus", "16384", "--gpu", "h100-80gb", "--rank", "9000", *settings, tmp_path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "rank 9000 of 16384 x h100-80gb, pipeline stage 4" in done.stdout
    told = json.loads((tmp_path / "rank.json").read_text())
    assert told["counted"]["parameters"] == told["predicted"]["weights"]
    assert f"{told['counted']['peak']:,}" in done.stdout


def test_a_model_that_has_a_grid_gives_the_rows_their_length(tmp_path):
    example = ROOT / "examples" / "llamagen_3b_cca.yaml"
    done = dry(example, "--gpus", "64", "--gpu", "h100-80gb", "--set", "model.num_layers=2", tmp_path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "rank 0 of 64 x h100-80gb, pipeline stage 0; rows of 576 tokens, 576 of them the image's" in done.stdout


def test_an_optimizer_that_only_gpus_have_is_counted_as_a_whole_one_and_said_so(tmp_path):
    """Megatron-Core makes it of Transformer Engine's Adam, or of the host's beside it."""
    keys = [
        "optimizer.use_precision_aware_optimizer=true",
        "optimizer.optimizer_cpu_offload=true",
        "model.num_layers=2",
    ]
    settings = [part for key in keys for part in ("--set", key)]
    done = dry(BIG, "--gpus", "8", "--gpu", "h100-80gb", *settings, tmp_path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "The optimizer's state was counted in fp32 on the GPU." in done.stdout


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["--gpus", "12"],
            "parallel.tensor_model_parallel_size 8 x parallel.pipeline_model_parallel_size 1 does not divide the 12 "
            "processes of this job; start a multiple of 8 (torchrun --nproc_per_node)",
        ),
        (["--gpus", "20000"], "--gpus: must be 1 to 16,384, found 20000"),
        (["--gpus", "8", "--rank", "8"], "--rank: must be 0 to 7, found 8"),
        (["--gpus", "8", "--gpu", "h1000"], "--gpu: 'h1000' is unknown; known: a100-40gb"),
        (["--gpus", "8", "--image-grid", "200x200"], "--image-grid: 200x200 with captions of 128 tokens needs"),
        (["--gpus", "8", "--output", "there.json"], "--output: there.json exists; give another name or --overwrite"),
        (
            ["--gpus", "8", "--gpu", "a100-80gb", "--set", "training.precision=fp8"],
            "training.precision: a100-80gb computes no fp8; use fp32 or bf16",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_the_cluster_would_refuse_is_refused_here(arguments, line, tmp_path):
    (tmp_path / "there.json").write_text("mine")
    done = dry(BIG, *arguments, tmp_path=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and line in done.stderr
    assert not done.stdout and (tmp_path / "there.json").read_text() == "mine"


@pytest.mark.full
def test_a_rank_that_does_not_fit_its_gpu_is_refused_after_the_count(tmp_path):
    settings = ["--set", "parallel.sequence_parallel=false", "--set", "parallel.tensor_model_parallel_size=1"]
    settings += ["--set", "model.num_layers=20"]
    done = dry(BIG, "--gpus", "256", "--gpu", "h100-80gb", *settings, tmp_path=tmp_path)
    assert done.returncode == 2
    assert "peak of all tensors" in done.stdout
    assert "megatron_cca: error: --gpu: rank 0 needs" in done.stderr


@pytest.mark.parametrize("gpus", [8, 64, 512])
def test_the_planned_examples_are_what_the_docs_say(gpus):
    path = ROOT / "examples" / f"emu3_8b_{gpus}x_h100.yaml"
    config = load_config(path)
    check_candidate(config, gpus)
    memory = predict_memory(config, gpus, WIDE_WORKLOAD)
    assert memory.total <= 0.92 * gpu_named("h100-80gb").memory_bytes
    column = (8, 64, 512).index(gpus)
    (line,) = [line for line in (ROOT / "docs" / "scaling.md").read_text().splitlines() if "total of 79.6" in line]
    told = line.replace("*", "").split("|")[2 + column].strip()
    assert told == f"{memory.total / 2**30:.1f}"
    assert f"{told} of 79.6 GiB" in path.read_text()


def test_the_example_for_one_node_is_what_the_planner_chooses():
    inputs = SearchInputs(Cluster(gpu_named("h100-80gb"), 8, 8), ImageShape(90, 90, 128))
    best = search(load_config(BIG), inputs, 1).best[0]
    assert config_to_dict(best.config) == config_to_dict(load_config(ROOT / "examples" / "emu3_8b_8x_h100.yaml"))
