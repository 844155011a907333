"""Alarms: a loss that jumps, a policy that collapses, and the advice that goes with them."""

import pytest

from megatron_cca.config.load import load_config
from megatron_cca.training.faults import Alarms


def alarms(*overrides):
    return Alarms(load_config(None, [*overrides]))


def feed(watch, losses, log_ratios, image_tokens=16.0):
    rows = [
        {"loss": loss} | ({} if ratio is None else {"positive_log_ratio": ratio})
        for loss, ratio in zip(losses, log_ratios, strict=True)
    ]
    return [line for row in rows for line in watch.after(row, image_tokens)]


def test_a_steady_run_is_silent():
    losses = [1.4 - 0.002 * step + 0.01 * (-1) ** step for step in range(200)]
    assert feed(alarms(), losses, [-0.02 * step for step in range(200)]) == []


def test_a_jump_of_the_loss_is_told_once_with_its_size():
    losses = [1.0 + 0.01 * (-1) ** step for step in range(30)]
    (line,) = feed(alarms(), [*losses, 3.0, 1.0, 1.0], [0.0] * 33)
    assert line.startswith("loss 3 jumped 1")
    assert "lower optimizer.lr (1e-05)" in line


@pytest.mark.parametrize("override", ["faults.loss_spike=null", "faults.loss_spike=1e9"])
def test_spikes_can_be_silenced(override):
    assert feed(alarms(override), [1.0] * 20 + [9.0], [0.0] * 21) == []


def test_too_few_losses_are_no_measure():
    assert feed(alarms(), [1.0] * 5 + [9.0], [0.0] * 6) == []


def test_collapse_is_told_once_a_fall_with_advice_on_beta_and_lambda():
    watch = alarms("objective.beta=0.05", "objective.negative_weight=100", "optimizer.lr=2e-3")
    down = [-2.0 * step for step in range(30)]
    (line,) = feed(watch, [1.0] * 30, down)
    assert "nats an image token (faults.positive_log_ratio_floor -1)" in line
    assert "lower objective.negative_weight (100), raise objective.beta (0.05) or lower optimizer.lr (0.002)" in line
    assert feed(watch, [1.0] * 15, [-1.0] * 15) == []
    assert len(feed(watch, [1.0] * 15, [-40.0] * 15)) == 1


def test_the_floor_is_for_an_image_token():
    assert feed(alarms(), [1.0] * 20, [-100.0] * 20, image_tokens=576.0) == []
    assert len(feed(alarms(), [1.0] * 20, [-600.0] * 20, image_tokens=576.0)) == 1


def test_collapse_can_be_silenced_and_needs_a_reference():
    assert feed(alarms("faults.positive_log_ratio_floor=null"), [1.0] * 20, [-900.0] * 20) == []
    assert feed(alarms("objective.name=next_token"), [1.0] * 20, [None] * 20) == []


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("dpo", "raise objective.beta (0.02) or lower optimizer.lr"),
        ("unlearning", "lower objective.negative_weight (1), or lower optimizer.lr"),
    ],
)
def test_advice_names_only_what_the_objective_has(name, advice):
    (line,) = feed(alarms(f"objective.name={name}"), [1.0] * 20, [-50.0] * 20)
    assert line.split("; ")[1].startswith(advice)
