"""What a run says about the log-ratio at step 0, and when it stops."""

import math

import pytest
import torch

from megatron_cca.config.load import load_config
from megatron_cca.data.reference_cache import ReferenceCacheWriter
from megatron_cca.errors import UserError
from megatron_cca.objectives import PairLogps
from megatron_cca.training.log_ratio_gate import (
    DEFAULT_ALLOWED,
    LogRatioSpread,
    check_log_ratio,
    log_ratio_spread,
    numeric_path,
    same_path,
)

ZERO, SMALL = LogRatioSpread(0.0, 0.0, 0.0, 512), LogRatioSpread(0.3, 0.4, 1.5, 512)
LOWER = ["reference.precision=bf16"]


def line(overrides=(), beta=0.02, spread=SMALL):
    """What is said of CCA with this beta; of unlearning, which has none."""
    own = "objective.name=unlearning" if beta is None else f"objective.beta={beta}"
    return check_log_ratio(load_config(None, [own, *overrides]), spread)


def refused(overrides=(), beta=0.02, spread=SMALL):
    with pytest.raises(UserError) as error:
        line(overrides, beta, spread)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_spread_is_over_positives_and_negatives():
    pairs = PairLogps(
        *(torch.tensor(values) for values in ([1.0, 2.0], [3.0, 4.0], [0.0, 2.5], [1.0, 4.0])),
        torch.tensor([False, True]),
    )
    spread = log_ratio_spread(pairs)
    ratios = [1.0, -0.5, 2.0, 0.0]
    mean = sum(ratios) / 4
    assert spread.mean == pytest.approx(mean)
    assert spread.std == pytest.approx(math.sqrt(sum((ratio - mean) ** 2 for ratio in ratios) / 4))
    assert (spread.worst, spread.rows) == (2.0, 4)
    assert spread.root_mean_square == pytest.approx(math.sqrt(sum(ratio**2 for ratio in ratios) / 4))


def test_nothing_at_all_is_said_to_be_exactly_0():
    assert line(spread=ZERO) == "step-0 log-ratio: exactly 0 (policy - reference, 512 rows, nats)"
    assert line(LOWER, spread=ZERO) == line(spread=ZERO)


def test_on_the_same_path_nothing_but_0_will_do():
    message = refused()
    assert message.startswith("step-0 log-ratio: mean 0.3, sd 0.4, worst 1.5 nats over 512 rows; beta x mean 0.006, ")
    assert "beta x root mean square 0.01: must be exactly 0" in message
    assert "--set reference.allow_bias=0.011" in message
    line([("reference.allow_bias=0.011")])


def test_between_precisions_the_threshold_decides():
    found = line(LOWER)
    assert found.endswith("beta x mean 0.006, beta x root mean square 0.01, 0.05 allowed")
    message = refused(LOWER, beta=0.2)
    assert f"beta x root mean square 0.1, only {DEFAULT_ALLOWED} allowed" in message
    assert "the policy computes in fp32, the reference in bf16, which bends the objective" in message
    assert message.endswith("--set reference.allow_bias=0.11")
    line([*LOWER, "reference.allow_bias=0.11"], beta=0.2)
    assert "only 0.009 allowed" in refused([*LOWER, "reference.allow_bias=0.009"])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["reference.fp8_param=true"], "the reference in fp32 with weights in FP8"),
        (["training.precision=fp8", "training.fp8_recipe=blockwise"], None),
        (
            ["training.precision=fp8", "training.fp8_recipe=delayed"],
            "in fp8 (delayed), the reference in fp8 (tensorwise)",
        ),
        (["training.precision=fp8", *LOWER], "the policy computes in fp8 (tensorwise), the reference in bf16"),
        (["training.precision=bf16", *LOWER], None),
        (["reference.strategy=offload"], None),
        (["model.hidden_dropout=0.1"], "dropout draws other masks for the reference than for the policy, which bends"),
        (["model.attention_dropout=0.1", *LOWER], "the objective; lower model.attention_dropout, lower objective.beta"),
    ],
)
def test_which_paths_are_the_same(overrides, words):
    assert same_path(load_config(None, overrides)) == (words is None)
    message = refused(overrides, beta=1.0)
    assert (words or "must be exactly 0") in message


def test_a_cache_is_the_same_path_on_the_layout_that_it_was_computed_on(tmp_path):
    overrides = ["reference.strategy=cached", f"reference.cache={tmp_path}"]
    ReferenceCacheWriter(tmp_path, {}, numeric_path(load_config(None, overrides)))
    assert same_path(load_config(None, overrides))
    other = [*overrides, "training.micro_batch_size=8"]
    assert not same_path(load_config(None, other))
    assert "from a cache of another layout or machine" in refused(other, beta=1.0)


def test_where_there_is_no_expectation_nothing_is_refused(tmp_path):
    other_weights = ["reference.checkpoint=elsewhere", "training.pretrained_checkpoint=here"]
    assert line(other_weights, beta=10.0) == "step-0 log-ratio: mean 0.3, sd 0.4, worst 1.5 nats over 512 rows"
    assert "must be exactly 0" in refused(["reference.checkpoint=x/../here", "training.pretrained_checkpoint=here"])
    # Unlearning's gradient does not depend on the reference.
    assert line(beta=None) == line(other_weights)
