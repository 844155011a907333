"""Log-probabilities over the visual words alone (``objective.normalization: image``) under every kind of layout.

Oracle: the plain-PyTorch trainer, whose other words have no probability. Tolerances are those of the whole vocabulary.
"""

import pytest
import torch

from megatron_cca.config.load import load_config
from megatron_cca.training import head_support
from tests.distributed.launch import run_workers
from tests.distributed.test_layout_parity import (
    CCA,
    CP2,
    LOSS_RTOL,
    NORM_RTOL,
    PP2,
    TP2,
    VPP2,
    assert_as_independently_trained,
    column,
    under,
    weights_to_start_from,
)

IMAGE = "objective.normalization=image"
STEPS = 3
BY_RANKS = {
    1: {"one process": [], "full recompute": ["training.recompute_granularity=full"], "LoRA": ["lora.dim=4"]},
    2: {"TP 2 + SP": [*TP2, "parallel.sequence_parallel=true"], "PP 2 x VPP 2": VPP2, "CP 2": CP2, "DP 2": []},
    4: {"TP 2 x PP 2": [*TP2, *PP2]},
}
LAYOUTS = [name for layouts in BY_RANKS.values() for name in layouts]


@pytest.fixture(scope="module")
def common(digit_shards):
    return [*CCA, IMAGE, f"data.path={digit_shards}"]


@pytest.fixture(scope="module")
def traces(common, tmp_path_factory):
    answers = {}
    for ranks, layouts in BY_RANKS.items():
        settings = {"common": common, "layouts": layouts, "steps": STEPS}
        answers |= run_workers(ranks, "traces", settings, tmp_path_factory.mktemp(f"ranks{ranks}"))
    return answers


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "LoRA"])
def test_every_layout_gives_the_same_trace(traces, layout):
    expected, found = traces["one process"], traces[layout]
    torch.testing.assert_close(column(found, "loss"), column(expected, "loss"), rtol=LOSS_RTOL, atol=0)
    torch.testing.assert_close(column(found, "grad_norm"), column(expected, "grad_norm"), rtol=NORM_RTOL, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_log_ratio_of_step_0_is_exactly_0(traces, layout):
    assert traces[layout][0]["worst"] == 0.0
    assert traces[layout][1]["worst"] > 0.0


def test_the_trace_equals_an_independent_trainer(traces, digit_shards):
    start = weights_to_start_from()
    vocabulary = start[1].vocabulary
    support = head_support(load_config(None, [IMAGE]), vocabulary)
    assert 1 < len(support) < vocabulary.size
    words = slice(support.start, support.stop)
    assert_as_independently_trained(traces["one process"], STEPS, digit_shards, start, words)


def test_it_is_another_objective_where_other_words_have_probability(traces, digit_shards, tmp_path):
    settings = {"common": [*CCA, f"data.path={digit_shards}"], "layouts": {"all": []}, "steps": STEPS}
    whole = run_workers(1, "traces", settings, tmp_path)["all"]
    assert abs(whole[-1]["positive_log_ratio"] - traces["one process"][-1]["positive_log_ratio"]) > 1e-3


@pytest.mark.parametrize("name", ["dpo", "unlearning", "next_token"])
def test_other_objectives_train_on_visual_words_too(name, common, tmp_path):
    layouts = {1: {"one": []}, 2: {"two": TP2}}
    one, two = (
        run_workers(
            ranks,
            "traces",
            {"common": under(name, common), "layouts": layouts[ranks], "steps": STEPS},
            tmp_path,
        )
        for ranks in layouts
    )
    torch.testing.assert_close(column(two["two"], "loss"), column(one["one"], "loss"), rtol=LOSS_RTOL, atol=1e-7)


def test_strategies_agree_to_the_last_bit(common, tmp_path):
    """With a cache, an offloaded reference, and the policy whose adapters are off."""
    short = ["training.global_batch_size=4", "training.micro_batch_size=2", "validation.fraction=0.01"]
    lora = ["lora.dim=4", "optimizer.lr=2e-2"]
    variants = {
        "resident": [],
        "offload": ["reference.strategy=offload"],
        "cached": ["reference.strategy=cached"],
        "LoRA resident": lora,
        "LoRA shared": [*lora, "reference.strategy=shared"],
    }
    settings = {
        "common": [*common, *short, "validation.interval=9", "validation.iters=2"],
        "layouts": {"one": []},
        "variants": variants,
        "steps": STEPS,
        "folder": str(tmp_path),
        "cache": None,
    }
    found = run_workers(1, "reference_traces", settings, tmp_path)
    assert found["one, offload"] == found["one, resident"] == found["one, cached"]
    assert found["one, LoRA shared"] == found["one, LoRA resident"]
