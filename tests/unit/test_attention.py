"""Whose core attention runs where Transformer Engine has no fused one, and what the planner makes of it."""

import pytest

from megatron_cca.config.load import load_config
from megatron_cca.errors import UserError
from megatron_cca.lab.planner.hardware import GPUS, Cluster
from megatron_cca.lab.planner.memory import predict_memory
from megatron_cca.lab.planner.throughput import predict_step
from megatron_cca.lab.planner.workload import Workload
from megatron_cca.models import FAMILIES
from megatron_cca.models.architecture import has_engine_attention, unfused_because
from megatron_cca.training.checks import check_new_run
from megatron_cca.training.kernel_checks import attention_lines

LARGE = ["model.name=llamagen-3b", "training.precision=bf16", "training.micro_batch_size=4"]
ENGINE, LOCAL = "model.transformer_impl=transformer_engine", "model.transformer_impl=local"
CP2 = ["parallel.context_parallel_size=2"]
ROWS = Workload(576, 576)
# Two rows a sample, 32 heads, bf16.
LAYER_SCORES = 2 * 4 * 32 * 576**2 * 2


@pytest.mark.parametrize(
    ("channels", "precision", "reason"),
    [
        (64, "bf16", None),
        (128, "fp8", None),
        (100, "bf16", "heads of 100 channels, no multiple of 8"),
        (100, "fp8", "heads of 100 channels, no multiple of 8"),
        (160, "bf16", "heads of 160 channels, more than 128"),
        (128, "fp32", "fp32"),
    ],
)
def test_auto_takes_the_engines_attention_where_it_is_fused(channels, precision, reason):
    assert unfused_because(channels, precision) == reason
    assert has_engine_attention("auto", channels, precision) == (reason is None)
    assert has_engine_attention("transformer_engine", channels, precision)
    assert not has_engine_attention("local", channels, precision)


def test_of_all_presets_one_has_heads_that_are_not_fused():
    presets = {name: preset for family in FAMILIES.values() for name, preset in family.presets.items()}
    # Next-scale prediction has an attention of its own, scale by scale.
    causal = {name: preset for name, preset in presets.items() if not preset.scales}
    unfused = [name for name, preset in causal.items() if unfused_because(preset.kv_channels, "bf16")]
    assert unfused == ["llamagen-3b"] and len(causal) < len(presets)


def lines(*overrides, has_engine=True):
    return attention_lines(load_config(None, [*LARGE, *overrides]), has_engine=has_engine)


def test_attention_scale_by_scale_is_torchs():
    config = load_config(None, ["model.name=var-d16"])
    assert attention_lines(config, has_engine=True) == [
        "layers: Transformer Engine's; attention: torch's, scale by scale"
    ]


def test_a_run_says_whose_attention_it_has_and_why():
    assert lines() == [
        "layers: Transformer Engine's; attention: torch's, for want of a fused one there for heads of 100 channels, no "
        "multiple of 8"
    ]
    assert lines("model.name=llamagen-xl") == ["layers and attention: Transformer Engine's"]
    assert lines(LOCAL) == ["layers: local; attention: torch's (model.transformer_impl is local)"]
    assert lines(has_engine=False) == []
    assert pytest.approx(3.80, abs=0.005) == 24 * LAYER_SCORES / 2**30
    assert lines(ENGINE) == [
        "layers and attention: Transformer Engine's, which is not fused for heads of 100 channels, no multiple of 8: a "
        "microbatch's scores take 3.80 GiB on each rank until its backward pass; model.transformer_impl=auto keeps none"
    ]
    both = lines("model.name=llamagen-xl", "reference.precision=fp32")
    assert [line.partition(";")[0] for line in both] == [
        "layers and attention: Transformer Engine's",
        "layers: Transformer Engine's",
    ]


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ([], "training.precision is bf16"),
        (["model.name=llamagen-xl", "reference.precision=fp32"], "reference.precision is fp32"),
    ],
)
def test_context_parallelism_with_unfused_attention_is_refused(overrides, key):
    with pytest.raises(UserError, match=f"^model.transformer_impl: .* no context parallelism .{key}.; use auto$"):
        check_new_run(load_config(None, [*LARGE, *CP2, *overrides, ENGINE]), 2)
    check_new_run(load_config(None, [*LARGE, *CP2, *overrides]), 2)


def memory(*overrides):
    return predict_memory(load_config(None, [*LARGE, *overrides]), 8, ROWS)


def test_the_planner_counts_the_scores_where_they_are_kept():
    fused, unfused = memory(), memory(ENGINE)
    # All layers keep them; what one layer works with is larger elsewhere, in this model's MLP.
    assert unfused.activations - fused.activations > 23 * LAYER_SCORES
    assert memory(LOCAL) == fused
    recomputed = [f"training.{key}" for key in ("recompute_granularity=selective", "recompute_modules=[core_attn]")]
    assert memory(ENGINE, *recomputed).activations < fused.activations + 4 * LAYER_SCORES
    aligned = "model.hidden_size=3072"
    assert memory(aligned, ENGINE) == memory(aligned)


def step(*overrides):
    config = load_config(None, [*LARGE, *overrides])
    return predict_step(config, Cluster(GPUS["h100-80gb"], 8, 8), ROWS)


def test_the_planner_knows_that_unfused_attention_is_slower_and_that_torchs_gathers():
    assert step(ENGINE).compute > step().compute == step(LOCAL).compute
    assert step(*CP2).context_parallel == step(*CP2, LOCAL).context_parallel > 0
