"""Overlaps and bucket sizes change when things are sent, not what is computed; saving and resuming included."""

import pytest
import torch

from tests.distributed.launch import run_workers
from tests.distributed.test_layout_parity import CCA, LOSS_RTOL, NORM_RTOL, PP2, SIZED_BY_PRESET, VPP2, column
from tests.selection import Computed, mostly_full

STEPS = 2
REDUCE = ["optimizer.overlap_grad_reduce=true"]
# Buckets of a few layers' weights, so that there are many.
GATHER = [*REDUCE, "optimizer.overlap_param_gather=true", "optimizer.ddp_bucket_size=2000"]
INSTANCES = ["optimizer.num_distributed_optimizer_instances=2"]
FREE = ["parallel.deallocate_pipeline_outputs=true"]
LORA = ["lora.dim=4", "optimizer.lr=2e-2", "reference.strategy=shared"]
SMALL_STEPS = ["training.micro_batch_size=1"]
BF16 = ["training.precision=bf16"]
# By ranks and layout: the plain run, and what must equal it. These validate, save and resume, too.
SAVED = {
    2: {
        "DP": (
            [],
            {
                "reduced in buckets": [*REDUCE, "optimizer.ddp_bucket_size=2000"],
                "gathered": GATHER,
                "averaged in the collective": ["optimizer.average_in_collective=true"],
                "padded": [*GATHER, "optimizer.pad_buckets_for_high_nccl_busbw=true"],
            },
        ),
        "LoRA": (LORA, {"gathered": [*GATHER, "optimizer.ddp_bucket_size=200"]}),
        # Its model uses weights of the embedding, of the head and of modulations in ways of its own.
        "VAR": ([], {"gathered": GATHER}),
    },
    4: {
        "DP": ([], {"two instances": INSTANCES, "two instances, gathered": [*INSTANCES, *GATHER]}),
        "VPP x DP": ([*VPP2, *SMALL_STEPS], {"gathered": GATHER}),
    },
}
PIPELINES = {
    "PP": (PP2, {"outputs freed": FREE}),
    "VPP": (
        [*VPP2, *SMALL_STEPS],
        {
            "outputs freed": FREE,
            "waiting for each message": ["parallel.overlap_p2p_comm=false"],
            "in groups of three": ["parallel.microbatch_group_size_per_vp_stage=3"],
        },
    ),
}
SAVED_CASES, PIPELINE_CASES = (
    [(ranks, layout, name) for ranks, layouts in jobs.items() for layout in layouts for name in layouts[layout][1]]
    for jobs in (SAVED, {2: PIPELINES})
)


def runs_of(layouts):
    plain = {layout: overrides for layout, (overrides, _) in layouts.items()}
    return plain | {
        f"{layout} {name}": [*overrides, *more]
        for layout, (overrides, variants) in layouts.items()
        for name, more in variants.items()
    }


SETTINGS = ["training.micro_batch_size=2", "validation.interval=9", "validation.fraction=0.01", "validation.iters=1"]


@pytest.fixture(scope="module")
def common(digit_shards):
    return [*CCA, *SETTINGS, f"data.path={digit_shards}"]


@pytest.fixture(scope="module")
def saved(common, tiny_var, tmp_path_factory):
    """By ranks and layout: the plain run and its variants."""

    def run(case):
        ranks, layout = case
        folder = tmp_path_factory.mktemp("saved")
        model = [*SIZED_BY_PRESET, *SETTINGS, *tiny_var] if layout == "VAR" else common
        layouts = runs_of({layout: SAVED[ranks][layout]})
        settings = {"common": model, "layouts": layouts, "steps": STEPS, "folder": str(folder)}
        return {case: run_workers(ranks, "checkpoint_workers.interrupted", settings, folder)}

    return Computed(run)


@pytest.fixture(scope="module")
def pipelines(common, tmp_path_factory):
    """By layout: the plain run and its variants."""

    def run(layout):
        settings = {"common": common, "layouts": runs_of({layout: PIPELINES[layout]}), "steps": 2 * STEPS}
        return {layout: run_workers(2, "traces", settings, tmp_path_factory.mktemp("pipelines"))}

    return Computed(run)


def in_make_test(case):
    return case[:2] in [(2, "DP"), (2, "VAR"), (4, "VPP x DP"), (2, "VPP")]


def assert_equal(found, plain):
    for name, tolerance in (("loss", LOSS_RTOL), ("grad_norm", NORM_RTOL)):
        torch.testing.assert_close(column(found, name), column(plain, name), rtol=tolerance, atol=0)
    assert found[0]["worst"] == 0.0


@pytest.mark.parametrize(("ranks", "layout", "variant"), mostly_full(SAVED_CASES, in_make_test))
def test_the_numbers_are_the_plain_run_s(saved, ranks, layout, variant):
    found, plain = saved[ranks, layout][f"{layout} {variant}"], saved[ranks, layout][layout]
    assert_equal(found["steps"], plain["steps"])
    assert found["validation"]["loss"] == pytest.approx(plain["validation"]["loss"], rel=LOSS_RTOL)


@pytest.mark.parametrize(("ranks", "layout", "variant"), mostly_full(SAVED_CASES, in_make_test))
def test_a_save_holds_the_last_update(saved, ranks, layout, variant):
    found = saved[ranks, layout][f"{layout} {variant}"]
    assert found["stale"] == 0
    assert found["resumed"] == found["steps"][STEPS:]


@pytest.mark.parametrize(
    ("ranks", "layout", "variant"), mostly_full([case for case in SAVED_CASES if "gathered" in case[2]], in_make_test)
)
def test_no_weight_is_used_before_it_has_arrived(saved, ranks, layout, variant):
    found = saved[ranks, layout][f"{layout} {variant}"]
    assert found["late"] == 0
    # Interleaved, all chunks but the first are one bucket each.
    assert found["buckets"] > 3


@pytest.mark.parametrize(("_ranks", "layout", "variant"), mostly_full(PIPELINE_CASES, in_make_test))
def test_how_stages_hand_on_changes_no_number(pipelines, _ranks, layout, variant):
    assert pipelines[layout][f"{layout} {variant}"] == pipelines[layout][layout]
    assert_equal(pipelines[layout][f"{layout} {variant}"], pipelines[layout][layout])


@pytest.mark.full
def test_what_several_instances_have_saved_continues_anywhere(saved, common, tmp_path):
    found = saved[4, "DP"]["DP two instances, gathered"]
    settings = {"overrides": [*common, f"training.output_dir={found['folder']}"], "steps": STEPS}
    rows = run_workers(1, "checkpoint_workers.resume", settings, tmp_path)["rows"]
    torch.testing.assert_close(column(rows, "loss"), column(found["steps"][STEPS:], "loss"), rtol=LOSS_RTOL, atol=0)


def test_gradients_may_be_reduced_in_bfloat16(common, tmp_path):
    layouts = {"fp32": BF16, "bf16": [*BF16, "optimizer.grad_reduce_in_fp32=false"]}
    found = run_workers(2, "traces", {"common": common, "layouts": layouts, "steps": 5}, tmp_path)
    torch.testing.assert_close(column(found["bf16"], "loss"), column(found["fp32"], "loss"), rtol=0.02, atol=0)
    assert column(found["bf16"], "grad_norm").tolist() != column(found["fp32"], "grad_norm").tolist()
