"""Objectives against the formulas of arXiv 2410.09347, written out row by row in float64."""

import math

import numpy as np
import pytest
import torch

from megatron_cca.errors import UserError
from megatron_cca.objectives import OBJECTIVES, PairLogps, SequenceLogps


def random_pairs(rows=64, seed=0, flagged_share=0.3, dtype=torch.float32, scale=20.0):
    generator = torch.Generator().manual_seed(seed)
    logps = [(-scale * torch.rand(rows, generator=generator, dtype=torch.float64) - 50).to(dtype) for _ in range(4)]
    return PairLogps(*logps, torch.rand(rows, generator=generator) < flagged_share)


def cca_oracle(pairs: PairLogps, beta: float, weight: float) -> float:
    total = 0.0
    columns = [getattr(pairs, name).double().tolist() for name in PairLogps.__dataclass_fields__]
    for policy_pos, policy_neg, reference_pos, reference_neg, flagged in zip(*columns, strict=True):
        positive, negative = policy_pos - reference_pos, policy_neg - reference_neg
        row = math.log1p(math.exp(-beta * positive))
        if flagged:
            row += math.log1p(math.exp(-beta * negative))
        else:
            row += weight * math.log1p(math.exp(beta * negative))
        total += row
    return total / len(columns[0]) / max(weight, 1.0)


@pytest.mark.parametrize(("beta", "weight"), [(0.02, 1.0), (0.1, 0.3), (0.5, 1000.0), (2.0, 50.0)])
@pytest.mark.parametrize("flagged_share", [0.0, 0.3, 1.0])
def test_cca_equals_the_formula(beta, weight, flagged_share):
    pairs = random_pairs(flagged_share=flagged_share)
    result = OBJECTIVES["cca"](beta=beta, negative_weight=weight)(pairs)
    assert result.loss.item() == pytest.approx(cca_oracle(pairs, beta, weight), rel=1e-6)
    assert result.metrics["loss"].item() == result.loss.item()


@pytest.mark.parametrize("weight", [0.3, 1.0, 300.0])
def test_cca_gradient_equals_finite_differences(weight):
    pairs = random_pairs(rows=6, dtype=torch.float64)
    policy = [pairs.policy_positive.requires_grad_(), pairs.policy_negative.requires_grad_()]

    def loss(positive, negative):
        rows = PairLogps(
            positive, negative, pairs.reference_positive, pairs.reference_negative, pairs.negative_is_positive
        )
        return OBJECTIVES["cca"](beta=0.1, negative_weight=weight)(rows).loss

    assert torch.autograd.gradcheck(loss, policy)


@pytest.mark.parametrize("weight", [0.5, 1.0, 100.0])
def test_cca_at_step_0_is_ln2_times_one_plus_the_mean_weight(weight):
    pairs = random_pairs()
    same = PairLogps(
        pairs.policy_positive,
        pairs.policy_negative,
        pairs.policy_positive,
        pairs.policy_negative,
        pairs.negative_is_positive,
    )
    mean_weight = np.where(pairs.negative_is_positive.numpy(), 1.0, weight).mean()
    result = OBJECTIVES["cca"](beta=0.1, negative_weight=weight)(same)
    assert result.loss.item() == pytest.approx(math.log(2) * (1 + mean_weight) / max(weight, 1), rel=1e-6)
    assert result.metrics["positive_log_ratio"].item() == 0.0
    assert result.metrics["margin"].item() == 0.0


def test_cca_metrics_by_hand():
    pairs = PairLogps(
        policy_positive=torch.tensor([-1.0, -2.0, -3.0]),
        policy_negative=torch.tensor([-5.0, -1.0, -3.0]),
        reference_positive=torch.tensor([-2.0, -2.0, -5.0]),
        reference_negative=torch.tensor([-4.0, -4.0, -5.0]),
        negative_is_positive=torch.tensor([False, False, True]),
    )
    metrics = OBJECTIVES["cca"](beta=0.1, negative_weight=1.0)(pairs).metrics
    assert metrics["positive_log_ratio"].item() == pytest.approx((1 + 0 + 2) / 3)
    assert metrics["negative_log_ratio"].item() == pytest.approx((-1 + 3) / 2)
    assert metrics["margin"].item() == pytest.approx((2 - 3) / 2)
    assert metrics["accuracy"].item() == pytest.approx(0.5)
    assert metrics["positive_as_negative"].item() == pytest.approx(1 / 3)


def test_cca_stays_finite_far_from_the_reference():
    extreme = torch.tensor([1e4, -1e4])
    zeros = torch.zeros(2)
    pairs = PairLogps(extreme, extreme.flip(0), zeros, zeros, torch.tensor([False, True]))
    result = OBJECTIVES["cca"](beta=0.5, negative_weight=10.0)(pairs)
    assert all(math.isfinite(value.item()) for value in result.metrics.values())


@pytest.mark.parametrize(("key", "value"), [("beta", 0.0), ("beta", -0.1), ("negative_weight", 0.0)])
def test_cca_refuses_what_is_not_positive(key, value):
    settings = {"beta": 0.1, "negative_weight": 1.0, key: value}
    with pytest.raises(UserError, match=rf"objective\.{key}: must be greater than 0"):
        OBJECTIVES["cca"](**settings)


def table_3_oracle(name: str, pairs: PairLogps, beta: float, weight: float) -> float:
    total = 0.0
    columns = [getattr(pairs, field).double().tolist() for field in PairLogps.__dataclass_fields__]
    for policy_pos, policy_neg, reference_pos, reference_neg, flagged in zip(*columns, strict=True):
        positive, negative = policy_pos - reference_pos, policy_neg - reference_neg
        if name == "dpo":
            total += math.log1p(math.exp(-beta * (positive - negative)))
        else:
            total += (-positive + (-negative if flagged else weight * negative)) / max(weight, 1.0)
    return total / len(columns[0])


def build(name, beta, weight):
    settings = {"beta": beta, "negative_weight": weight}
    return OBJECTIVES[name](**{key: settings[key] for key in OBJECTIVES[name].__dataclass_fields__ if key in settings})


@pytest.mark.parametrize("name", ["dpo", "unlearning"])
@pytest.mark.parametrize(("beta", "weight"), [(0.02, 0.3), (0.5, 50.0)])
@pytest.mark.parametrize("flagged_share", [0.0, 0.3, 1.0])
def test_the_ablations_equal_their_formulas(name, beta, weight, flagged_share):
    pairs = random_pairs(flagged_share=flagged_share)
    result = build(name, beta, weight)(pairs)
    assert result.loss.item() == pytest.approx(table_3_oracle(name, pairs, beta, weight), rel=1e-5)
    cca = OBJECTIVES["cca"](beta=beta, negative_weight=weight)(pairs)
    assert {**result.metrics, "loss": 0} == {**cca.metrics, "loss": 0}


@pytest.mark.parametrize("name", ["dpo", "unlearning"])
def test_the_ablations_gradients_equal_finite_differences(name):
    pairs = random_pairs(rows=6, dtype=torch.float64)
    policy = [pairs.policy_positive.requires_grad_(), pairs.policy_negative.requires_grad_()]

    def loss(positive, negative):
        rest = (pairs.reference_positive, pairs.reference_negative, pairs.negative_is_positive)
        return build(name, 0.1, 3.0)(PairLogps(positive, negative, *rest)).loss

    assert torch.autograd.gradcheck(loss, policy)


@pytest.mark.parametrize(("name", "expected"), [("dpo", math.log(2)), ("unlearning", 0.0)])
def test_the_ablations_at_step_0(name, expected):
    pairs = random_pairs()
    logps = (pairs.policy_positive, pairs.policy_negative)
    result = build(name, 0.1, 3.0)(PairLogps(*logps, *logps, pairs.negative_is_positive))
    assert result.loss.item() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(("name", "key"), [("dpo", "beta"), ("unlearning", "negative_weight")])
def test_the_ablations_refuse_what_is_not_positive(name, key):
    with pytest.raises(UserError, match=rf"objective\.{key}: must be greater than 0, found 0"):
        OBJECTIVES[name](**{key: 0.0})


def test_next_token_is_the_mean_over_all_image_tokens_however_the_batch_is_cut():
    logps = torch.tensor([-10.0, -20.0, -30.0, -40.0])
    tokens = torch.tensor([10.0, 10.0, 20.0, 40.0])
    objective = OBJECTIVES["next_token"]()
    halves = [objective(SequenceLogps(half, tokens.mean().item())).loss for half in logps.chunk(2)]
    assert torch.stack(halves).mean().item() == pytest.approx(100 / 80)
