"""Every reference strategy gives the same numbers to the last bit; nothing of the policy depends on which it is."""

import pytest
import torch

from tests.distributed.launch import run_workers
from tests.distributed.test_layout_parity import (
    CCA,
    CP2,
    LOSS_RTOL,
    NORM_RTOL,
    PP2,
    SIZED_BY_PRESET,
    TP2,
    TP2_SP,
    VPP2,
    column,
)
from tests.selection import Computed, mostly_full

STEPS = 3
SHORT = ["training.global_batch_size=4", "training.micro_batch_size=2"]
VALIDATION = ["validation.interval=9", "validation.fraction=0.01", "validation.iters=2"]
OFFLOAD, CACHED = ["reference.strategy=offload"], ["reference.strategy=cached"]
SHARED = ["reference.strategy=shared"]
LORA = ["lora.dim=4", "optimizer.lr=2e-2"]
FP8, BF16 = ["reference.fp8_param=true"], ["training.precision=bf16"]
OTHER = ["reference.precision=bf16"]
VARIANTS = {"resident": [], "offload": OFFLOAD, "cached": CACHED}
ADAPTED = {f"LoRA {name}": [*LORA, *overrides] for name, overrides in {**VARIANTS, "shared": SHARED}.items()}
LOWER = {
    "FP8 resident": FP8,
    "FP8 offload": [*FP8, *OFFLOAD],
    "FP8 cached": [*FP8, *CACHED],
    "bf16 resident": OTHER,
    "bf16 offload": [*OTHER, *OFFLOAD],
    "bf16 cached": [*OTHER, *CACHED],
    "all in bf16 resident": BF16,
    "all in bf16 offload": [*BF16, *OFFLOAD],
}
ALONE = {**VARIANTS, **ADAPTED, **LOWER}
TOGETHER = {**VARIANTS, **{name: ADAPTED[name] for name in ("LoRA resident", "LoRA shared")}}
LAYOUTS = {
    "one process": (1, [], ALONE),
    "TP 2 + SP": (2, TP2_SP, TOGETHER),
    "PP 2": (2, PP2, TOGETHER),
    "PP 2 x VPP 2": (2, VPP2, TOGETHER),
    "DP 2": (2, [], TOGETHER),
    "CP 2": (2, CP2, TOGETHER),
}
MODELS = {"Emu3": LAYOUTS, "VAR": ["one process", "TP 2 + SP", "DP 2"]}
EXACT = ["resident", "offload", "cached", *ADAPTED, "all in bf16 resident", "all in bf16 offload"]


@pytest.fixture(scope="module")
def common(digit_shards):
    return [*CCA, *SHORT, *VALIDATION, f"data.path={digit_shards}"]


@pytest.fixture(scope="module")
def models(common, tiny_var):
    return {"Emu3": common, "VAR": [*SIZED_BY_PRESET, *tiny_var, *SHORT, *VALIDATION]}


@pytest.fixture(scope="module")
def answers(models, tmp_path_factory):
    """By family and layout: those of a layout are computed together, by variant."""

    def compute(case):
        family, layout = case
        ranks, overrides, variants = LAYOUTS[layout]
        folder = tmp_path_factory.mktemp("answers")
        settings = {"common": models[family], "layouts": {layout: overrides}, "variants": variants, "steps": STEPS}
        found = run_workers(ranks, "reference_traces", {**settings, "folder": str(folder), "cache": None}, folder)
        return {case: {variant: found[f"{layout}, {variant}"] for variant in variants}}

    return Computed(compute)


KEPT = {("Emu3", "one process"), ("Emu3", "TP 2 + SP"), ("Emu3", "PP 2 x VPP 2"), ("VAR", "TP 2 + SP")}
KEPT |= {("VAR", "one process")}
RUNS = [(family, layout) for family, layouts in MODELS.items() for layout in layouts]
CASES = [(*run, name) for run in RUNS for name in LAYOUTS[run[1]][2]]


@pytest.mark.parametrize(("family", "layout", "variant"), mostly_full(CASES, lambda case: case[:2] in KEPT))
def test_strategies_agree_to_the_last_bit(answers, family, layout, variant):
    kind = variant.removesuffix("offload").removesuffix("cached").removesuffix("shared").removesuffix("resident")
    found = answers[family, layout]
    assert found[variant] == found[f"{kind}resident"]


@pytest.mark.parametrize(("family", "layout", "variant"), mostly_full(CASES, lambda case: case[:2] in KEPT))
def test_the_log_ratio_of_step_0_is_0_where_weights_and_precision_are_the_same(answers, family, layout, variant):
    steps = answers[family, layout][variant]["steps"]
    assert (steps[0]["worst"] == 0.0) == (variant in EXACT)
    # Weights in FP8 or bf16 are near, not equal.
    assert steps[0]["worst"] < 5.0
    assert steps[1]["worst"] > 0.0


@pytest.mark.parametrize(("family", "layout"), mostly_full(RUNS, KEPT))
def test_the_log_ratio_of_a_validation_after_training_is_not_0(answers, family, layout):
    assert answers[family, layout]["cached"]["validation"]["positive_log_ratio"] != 0.0


def test_a_cache_serves_another_layout(common, answers, tmp_path):
    settings = {"common": common, "variants": {"cached": CACHED}, "steps": STEPS}
    settings |= {"folder": str(tmp_path), "cache": str(tmp_path / "cache")}
    run_workers(2, "reference_traces", {**settings, "layouts": {"TP 2": TP2}}, tmp_path)
    layouts = {"one process, micro batch 1": ["training.micro_batch_size=1"]}
    found = run_workers(1, "reference_traces", {**settings, "layouts": layouts}, tmp_path)
    trace = found["one process, micro batch 1, cached"]["steps"]
    expected = answers["Emu3", "one process"]["resident"]["steps"]
    torch.testing.assert_close(column(trace, "loss"), column(expected, "loss"), rtol=LOSS_RTOL, atol=0)
    torch.testing.assert_close(column(trace, "grad_norm"), column(expected, "grad_norm"), rtol=NORM_RTOL, atol=0)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_reference_that_moves_with_the_policy_ends_the_run(common, ranks, tmp_path):
    settings = {"overrides": [*common, *(TP2 if ranks == 2 else [])]}
    answer = run_workers(ranks, "references_after_an_update", settings, tmp_path)
    assert (answer["honest"], answer["moving"], answer["later"]) == (True, False, None)
    assert answer["message"].startswith("reference: its log-probabilities of step 0 are others after the first update")


def test_a_reference_that_fails_leaves_the_policy_alone(common, tmp_path):
    answer = run_workers(1, "broken_offload", {"overrides": [*common, *OFFLOAD]}, tmp_path)
    assert answer["message"] == "out of memory"
    assert answer["untouched"]
    assert answer["iteration"] == 1
    assert answer["broken"] == answer["unbroken"]


@pytest.mark.parametrize(("family", "layers"), [("Emu3", 4), ("VAR", 3)])
def test_an_offloaded_reference_has_two_parts_on_the_device_at_most(family, layers, models, tmp_path):
    answer = run_workers(1, "offload_occupancy", {"overrides": [*models[family], *OFFLOAD]}, tmp_path)
    # The embedding, the layers, the head; two microbatches, and the embedding once in vain. Step 0 has two such passes.
    parts = layers + 2
    assert answer == {"parts": parts, "most": 2, "copies": 2 * (2 * parts + 1), "left": 0}


DROPOUT = ["model.hidden_dropout=0.1", "model.attention_dropout=0.1", "reference.allow_bias=9"]


def test_dropout_draws_masks_for_both_models_in_training_and_for_none_in_a_validation(common, tmp_path):
    """Authors of CCA keep pretraining's dropout in both models; what differs is then noise, and only in training."""
    variants = {name: [*DROPOUT, *VARIANTS[name]] for name in ("resident", "offload")}
    settings = {"common": common, "layouts": {"one": []}, "variants": variants, "steps": STEPS}
    settings |= {"folder": str(tmp_path), "cache": None}
    found = run_workers(1, "reference_traces", settings, tmp_path)
    assert found["one, resident"] == found["one, offload"]
    assert found["one, resident"]["steps"][0]["worst"] > 0.1
    before = {"common": [*common, *DROPOUT], "layouts": {"resident": [], "offload": OFFLOAD}, "steps": 0}
    for name, answer in run_workers(1, "validations", before, tmp_path).items():
        assert answer["before"]["positive_log_ratio"] == answer["before"]["margin"] == 0.0, name
