"""What clusters lose, fitted to published runs, and the planner's curves with it."""

import math

import pytest

from megatron_cca.lab.planner.hardware import (
    LOSS,
    PUBLISHED,
    SPREAD,
    Cluster,
    PublishedSpeeds,
    fit,
    lost_share,
    lost_spread,
)
from tests.unit.test_planner_anchors import A100, GPT_3, H100, LLAMA_405B, RUNS, predicted
from tests.unit.test_planner_throughput import predict


def series(loss, gpus=(8, 64, 512), modelled=(3.0, 2.0, 1.0)):
    kept = [math.exp(-loss * math.log2(count / gpus[0])) for count in gpus]
    return PublishedSpeeds("made", "", gpus, tuple(m * k for m, k in zip(modelled, kept, strict=True)), modelled)


def test_a_known_loss_is_found_again_with_its_spread():
    assert fit([series(0.03)]) == pytest.approx((0.03, 0), abs=1e-9)
    # Each weighs as many times as it doubles: six times and three.
    found = fit([series(0.01), series(0.04, (8, 64), (1.0, 1.0))])
    assert found == pytest.approx((0.02, math.sqrt((6 * 0.01**2 + 3 * 0.02**2) / 9)))


def test_the_term_is_what_the_table_gives():
    assert fit(PUBLISHED) == (LOSS, SPREAD)
    assert 0.007 < LOSS < 0.011
    assert 0.012 < SPREAD < 0.018
    assert max(one.gpus[-1] for one in PUBLISHED) > 10_000
    assert all(one.source and len(one.gpus) == len(one.published) == len(one.modelled) for one in PUBLISHED)


def without(*run, **shape):
    step = predicted(*run, **shape)
    return step.tokens_per_gpu / (step.total - step.cluster)


def gpt_3(gpu, gpus, layout, batch, **shape):
    return without(gpu, gpus, GPT_3, layout, 1, batch, "bf16", {}, **shape)


MODELLED = {
    "torchtitan 8B, H100, bf16, weak": lambda n: without(*RUNS["torchtitan 8B" + " on 128" * (n > 8)][:-1]),
    "torchtitan 8B, H100, FP8, weak": lambda n: without(*RUNS["torchtitan 8B" + " on 128" * (n > 8) + ", FP8"][:-1]),
    "Megatron-LM 175B, H100, strong": lambda n: gpt_3(H100, n, (8, 12, 1, 8), 1152, seq_length=4096, vocab_size=131072),
    "175B, A100, strong": lambda n: gpt_3(
        A100, n, (8, 8, 1, 6), 768 if n <= 1024 else 6144, seq_length=2048, vocab_size=64000
    ),
    "Llama 3 405B, H100, strong": lambda n: without(H100, n, LLAMA_405B, (8, 16, 1, 8), 1, 2048, "bf16", {}),
}


@pytest.mark.parametrize("key", MODELLED)
def test_what_the_planner_explains_is_the_planners(key):
    found = [one for one in PUBLISHED if key in one.name]
    assert found
    for one in found:
        now = [MODELLED[key](count) for count in one.gpus]
        wanted = [speed / one.modelled[0] for speed in one.modelled]
        assert [speed / now[0] for speed in now] == pytest.approx(wanted, rel=0.01)


def test_curves_fall_beyond_a_node_and_their_band_widens():
    steps = [predict(f"training.global_batch_size={4 * gpus}", gpus=gpus) for gpus in (8, 64, 4096)]
    assert steps[0].cluster == steps[0].cluster_spread == 0
    for step, doublings in zip(steps, (0, 3, 9), strict=True):
        assert step.total == pytest.approx((step.total - step.cluster) * math.exp(LOSS * doublings))
        assert step.error == pytest.approx(2 * math.hypot(step.relative_error, SPREAD * doublings))
        assert step.low == pytest.approx(step.total * (1 - step.error))
    kept = steps[2].tokens_per_second_per_gpu / steps[0].tokens_per_second_per_gpu
    assert 0.85 < kept < 0.96


def test_published_curves_lie_within_the_band():
    """Of the clusters alone: two standard deviations around what is expected, to rounding, for at least nine of ten."""
    inside = 0
    for one in PUBLISHED:
        found = one.published[-1] / one.published[0] / (one.modelled[-1] / one.modelled[0])
        inside += abs(math.log(found) + LOSS * one.doublings) < 2 * SPREAD * one.doublings
    assert inside >= 0.9 * len(PUBLISHED)


def test_half_a_node_loses_nothing():
    for gpus in (1, 4, 8):
        assert lost_share(Cluster(H100, gpus, 8)) == lost_spread(Cluster(H100, gpus, 8)) == 0
