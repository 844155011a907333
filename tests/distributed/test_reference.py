"""What a reference must not do: move with the policy, spoil it, fill the device. A cache serves other layouts."""

import pytest
import torch

from tests.distributed.launch import run_workers
from tests.distributed.test_layout_parity import (
    CCA,
    LOSS_RTOL,
    NORM_RTOL,
    SIZED_BY_PRESET,
    TP2,
    column,
)

STEPS = 3
SHORT = ["training.global_batch_size=4", "training.micro_batch_size=2"]
VALIDATION = ["validation.interval=9", "validation.fraction=0.01", "validation.iters=2"]
OFFLOAD, CACHED = ["reference.strategy=offload"], ["reference.strategy=cached"]
SHARED = ["reference.strategy=shared"]
LORA = ["lora.dim=4", "optimizer.lr=2e-2"]
VARIANTS = {"resident": [], "offload": OFFLOAD, "cached": CACHED}


@pytest.fixture(scope="module")
def common(digit_shards):
    return [*CCA, *SHORT, *VALIDATION, f"data.path={digit_shards}"]


@pytest.fixture(scope="module")
def models(common, tiny_var):
    return {"Emu3": common, "VAR": [*SIZED_BY_PRESET, *tiny_var, *SHORT, *VALIDATION]}


def test_a_cache_serves_another_layout(common, tmp_path):
    settings = {"common": common, "variants": {"cached": CACHED}, "steps": STEPS}
    settings |= {"folder": str(tmp_path), "cache": str(tmp_path / "cache")}
    run_workers(2, "reference_traces", {**settings, "layouts": {"TP 2": TP2}}, tmp_path)
    alone = {"alone": ["training.micro_batch_size=1"]}
    variants = {"cached": CACHED, "resident": []}
    found = run_workers(1, "reference_traces", {**settings, "layouts": alone, "variants": variants}, tmp_path)
    trace, expected = (found[f"alone, {name}"]["steps"] for name in variants)
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
