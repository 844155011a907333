"""The same 20 steps (3 in ``make test``) under every layout, and against an independent plain-PyTorch trainer.

fp32; relative tolerance 1e-5 on every loss and 1e-4 on every gradient norm, at every step.
"""

import shutil
from functools import partial

import pytest
import torch

from megatron_cca.config.load import load_config
from megatron_cca.models import resolve_architecture
from megatron_cca.objectives.base import keys_of
from megatron_cca.training.batches import open_data, training_batches
from tests.distributed.launch import run_workers
from tests.references import emu3
from tests.selection import mostly_full

STEPS, FEW_STEPS = mostly_full([3, 20], [3]), mostly_full([3, 5], [3])
LOSS_RTOL, NORM_RTOL = 1e-5, 1e-4
SMALL = ["model.hidden_size=32", "model.ffn_hidden_size=48", "model.num_attention_heads=4", "model.num_query_groups=2"]
CCA = [
    *SMALL,
    "model.init_method_std=0.2",  # large weights and a large learning rate, so that errors would show
    "objective.beta=0.1",
    "objective.negative_weight=3.0",
    "data.condition_dropout=0.2",
    "optimizer.lr=2e-3",
    "optimizer.weight_decay=0.1",
    "optimizer.clip_grad=1.0",
    "training.global_batch_size=8",
    "training.micro_batch_size=4",
]
# For a family whose tiny model has other sizes.
SIZED_BY_PRESET = [override for override in CCA if override not in SMALL]
TP2 = ["parallel.tensor_model_parallel_size=2"]
TP2_SP = [*TP2, "parallel.sequence_parallel=true"]
PP2 = ["parallel.pipeline_model_parallel_size=2"]
VPP2 = [*PP2, "parallel.virtual_pipeline_model_parallel_size=2"]
CP2 = ["parallel.context_parallel_size=2"]
FULL = ["training.recompute_granularity=full"]
BY_RANKS = {
    1: {
        "one process": [],
        "micro batch 8 x 1": ["training.micro_batch_size=8"],
        "micro batch 1 x 8": ["training.micro_batch_size=1"],
        "chunks of 7 tokens": ["training.logps_chunk_size=7"],
        "full recompute": FULL,
        "selective recompute": ["training.recompute_granularity=selective"],
        "selective recompute of the MLP, too": [
            "training.recompute_granularity=selective",
            "training.recompute_modules=[core_attn, mlp]",
        ],
        "plain optimizer": ["optimizer.use_distributed_optimizer=false"],
    },
    2: {
        "TP 2": TP2,
        "TP 2 + SP": TP2_SP,
        "PP 2": PP2,
        "PP 2, micro batch 1": [*PP2, "training.micro_batch_size=1"],
        "DP 2": [],
        "DP 2, overlapped": ["optimizer.overlap_grad_reduce=true", "training.micro_batch_size=2"],
        "PP 2 x VPP 2": VPP2,
        # Enough microbatches that forward and backward messages cross.
        "PP 2 x VPP 2, micro batch 1": [*VPP2, "training.micro_batch_size=1"],
        "PP 2 x VPP 2, overlapped": [*VPP2, "optimizer.overlap_grad_reduce=true", "training.micro_batch_size=1"],
        "CP 2": CP2,
    },
    4: {
        "TP 2 x PP 2": [*TP2, *PP2],
        "PP 2 x DP 2": [*PP2, "training.micro_batch_size=2"],
        "TP 2 + SP x PP 2 x VPP 2": [
            *(*TP2, *VPP2, "parallel.sequence_parallel=true"),
            "training.micro_batch_size=2",
        ],
        "TP 2 + SP x CP 2": [*TP2, *CP2, "parallel.sequence_parallel=true"],
        "PP 2 x CP 2": [*PP2, *CP2],
        "CP 2 x DP 2": [*CP2, "training.micro_batch_size=2"],
        "CP 4": ["parallel.context_parallel_size=4"],
        "PP 4": ["parallel.pipeline_model_parallel_size=4"],
    },
}


def under(name, overrides=CCA):
    """Overrides for another objective, without those keys of CCA that it does not have."""
    own = {f"objective.{key}" for key in keys_of(name)}
    kept = [one for one in overrides if not one.startswith("objective.") or one.partition("=")[0] in own]
    return [*kept, f"objective.name={name}"]


LAYOUTS = [name for layouts in BY_RANKS.values() for name in layouts]


@pytest.fixture(scope="module", params=STEPS, ids=lambda steps: f"{steps} steps")
def steps(request):
    return request.param


@pytest.fixture(scope="module")
def cca_traces(steps, digit_shards, tmp_path_factory):
    common = [*CCA, f"data.path={digit_shards}"]
    answers = {}
    for ranks, layouts in BY_RANKS.items():
        settings = {"common": common, "layouts": layouts, "steps": steps}
        answers |= run_workers(ranks, "traces", settings, tmp_path_factory.mktemp(f"ranks{ranks}"))
    return answers


def column(trace, name):
    return torch.tensor([row[name] for row in trace], dtype=torch.float64)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_trace(cca_traces, steps, layout):
    expected, found = cca_traces["one process"], cca_traces[layout]
    assert len(found) == steps
    torch.testing.assert_close(column(found, "loss"), column(expected, "loss"), rtol=LOSS_RTOL, atol=0)
    torch.testing.assert_close(column(found, "grad_norm"), column(expected, "grad_norm"), rtol=NORM_RTOL, atol=0)
    for name in ("positive_log_ratio", "negative_log_ratio", "margin"):
        torch.testing.assert_close(column(found, name), column(expected, name), rtol=1e-3, atol=1e-3)
    assert [row["accuracy"] for row in found] == [row["accuracy"] for row in expected]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_log_ratio_of_step_0_is_exactly_0(cca_traces, layout):
    assert cca_traces[layout][0]["worst"] == 0.0
    assert cca_traces[layout][1]["worst"] > 0.0


def test_the_trace_equals_an_independent_trainer(cca_traces, steps, digit_shards, initial_weights):
    assert_as_independently_trained(cca_traces["one process"], steps, digit_shards, initial_weights)


def assert_as_independently_trained(ours, steps, digit_shards, initial_weights, words=slice(None)):
    """Hold a trace of CCA to that of the plain-PyTorch trainer; other words than these have no probability."""
    objective = initial_weights[0].objective
    loss_of = partial(emu3.cca_loss, beta=objective.beta, weight=objective.negative_weight, words=words)
    assert_as_trained_by(ours, steps, [*CCA, f"data.path={digit_shards}"], initial_weights, loss_of)


def assert_as_trained_by(ours, steps, overrides, initial_weights, loss_of):
    config, architecture, weights = initial_weights
    whole = load_config(None, [*overrides, "training.micro_batch_size=8"])
    batches = training_batches(whole, open_data(whole), with_pairs=True)
    trace = emu3.train(
        weights,
        [batches.build(step, 0, 1).microbatches[0] for step in range(steps)],
        architecture,
        loss_of=loss_of,
        lr=config.optimizer.lr,
        betas=(config.optimizer.adam_beta1, config.optimizer.adam_beta2),
        eps=config.optimizer.adam_eps,
        weight_decay=config.optimizer.weight_decay,
        clip=config.optimizer.clip_grad,
    )
    losses, norms = (torch.tensor(values, dtype=torch.float64) for values in zip(*trace, strict=True))
    torch.testing.assert_close(column(ours, "loss"), losses, rtol=1e-4, atol=0)
    torch.testing.assert_close(column(ours, "grad_norm"), norms, rtol=1e-3, atol=0)


@pytest.fixture(scope="module")
def initial_weights():
    return weights_to_start_from()


def weights_to_start_from():
    """The configuration and architecture of the workers, and the weights that they start from, as a plain dict."""
    from megatron_cca.parallel.ranks import initialize_distributed
    from megatron_cca.training.setup import build_chunks

    config = load_config(None, CCA)
    architecture = resolve_architecture(config.model)
    initialize_distributed(config)
    (model,) = build_chunks(config, architecture, config.training, None, "training.pretrained_checkpoint")
    return config, architecture, {name: value.detach() for name, value in model.named_parameters()}


@pytest.mark.parametrize("steps", FEW_STEPS)
def test_next_token_pretraining_agrees_too(steps, digit_shards, tmp_path):
    common = [*under("next_token"), f"data.path={digit_shards}"]
    one = run_workers(1, "traces", {"common": common, "layouts": {"a": []}, "steps": steps}, tmp_path)["a"]
    layouts = {"PP 2": PP2, "CP 2": CP2, "PP 2 x VPP 2": VPP2}
    for two in run_workers(2, "traces", {"common": common, "layouts": layouts, "steps": steps}, tmp_path).values():
        torch.testing.assert_close(column(two, "loss"), column(one, "loss"), rtol=LOSS_RTOL, atol=0)
        torch.testing.assert_close(column(two, "grad_norm"), column(one, "grad_norm"), rtol=NORM_RTOL, atol=0)
    assert one[-1]["loss"] < one[0]["loss"]


def test_reference_and_policy_use_the_same_chunk_size(digit_shards, tmp_path):
    overrides = [*CCA, f"data.path={digit_shards}", "training.logps_chunk_size=7", "training.micro_batch_size=8"]
    assert run_workers(1, "head_chunk_sizes", {"overrides": overrides}, tmp_path) == [7, 7, 7]


# One of each kind; the others are for `make test-full`.
IN_BF16 = {
    1: ["one process", "selective recompute of the MLP, too"],
    2: ["TP 2 + SP", "DP 2, overlapped", "PP 2 x VPP 2, micro batch 1", "CP 2"],
    4: ["TP 2 + SP x PP 2 x VPP 2", "PP 2 x CP 2"],
}


@pytest.mark.parametrize("ranks", BY_RANKS)
@pytest.mark.parametrize("steps", FEW_STEPS)
def test_bfloat16_starts_at_exactly_0_and_follows_fp32(ranks, steps, digit_shards, tmp_path):
    own = BY_RANKS[ranks] if steps == 5 else {name: BY_RANKS[ranks][name] for name in IN_BF16[ranks]}
    common = [*CCA, f"data.path={digit_shards}"]
    settings = {"common": [*common, "training.precision=bf16"], "layouts": own, "steps": steps}
    fp32 = run_workers(1, "traces", {"common": common, "layouts": {"fp32": []}, "steps": steps}, tmp_path)["fp32"]
    for layout, trace in run_workers(ranks, "traces", settings, tmp_path).items():
        assert trace[0]["worst"] == 0.0, layout
        torch.testing.assert_close(column(trace, "loss"), column(fp32, "loss"), rtol=0.05, atol=0)


@pytest.mark.parametrize("steps", FEW_STEPS)
@pytest.mark.parametrize("name", ["dpo", "unlearning"])
def test_the_ablations_train_on_every_kind_of_layout(name, steps, digit_shards, tmp_path):
    common = [*under(name), f"data.path={digit_shards}"]
    one = run_workers(1, "traces", {"common": common, "layouts": {"one": []}, "steps": steps}, tmp_path)["one"]
    layouts = {"TP 2": TP2, "PP 2 x VPP 2": VPP2, "CP 2": CP2}
    for trace in run_workers(2, "traces", {"common": common, "layouts": layouts, "steps": steps}, tmp_path).values():
        torch.testing.assert_close(column(trace, "loss"), column(one, "loss"), rtol=LOSS_RTOL, atol=1e-6)
        torch.testing.assert_close(column(trace, "grad_norm"), column(one, "grad_norm"), rtol=NORM_RTOL, atol=0)
        assert trace[0]["worst"] == 0.0


# Beside pairs of images also a likelihood term; GFT has no pairs, but two rows of different lengths.
METHODS = {
    "ddo": ("ddo", ["objective.alpha=3.0"]),
    "gft": ("gft", ["objective.beta=0.4"]),
    "nca with a likelihood term": ("nca", ["data.pairs=images", "objective.sft_weight=0.5"]),
}
PLAIN = {"ddo": partial(emu3.ddo_loss, beta=0.1, alpha=3.0), "gft": partial(emu3.gft_loss, beta=0.4)}


@pytest.mark.parametrize("case", METHODS)
def test_methods_since_cca_train_on_every_kind_of_layout(case, digit_shards, initial_weights, tmp_path):
    name, own = METHODS[case]
    common = [*under(name), *own, f"data.path={digit_shards}"]
    if name != "gft":
        # Other images of the same digit.
        common.append(f"data.partner_path={shutil.copytree(digit_shards, tmp_path / 'partners')}")
    settings = {"common": common, "steps": 3}
    one = run_workers(1, "traces", {**settings, "layouts": {"one": []}}, tmp_path)["one"]
    layouts = {"TP 2": TP2, "TP 2 + SP": [*TP2, "parallel.sequence_parallel=true"], "PP 2": PP2, "DP 2": []}
    for layout, trace in run_workers(2, "traces", {**settings, "layouts": layouts}, tmp_path).items():
        torch.testing.assert_close(column(trace, "loss"), column(one, "loss"), rtol=LOSS_RTOL, atol=0, msg=layout)
        torch.testing.assert_close(column(trace, "grad_norm"), column(one, "grad_norm"), rtol=NORM_RTOL, atol=0)
        assert trace[0]["worst"] == (None if name == "gft" else 0.0)
    if case in PLAIN:
        assert_as_trained_by(one, 3, common, initial_weights, PLAIN[case])
