"""Objectives against the formulas of their papers, written out row by row in float64."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_cca.errors import UserError
from megatron_cca.objectives import OBJECTIVES, PairLogps, SequenceLogps

# Image tokens of a row, on average.
TOKENS = 16.0


def random_pairs(rows=64, seed=0, flagged_share=0.3, dtype=torch.float32, scale=20.0):
    generator = torch.Generator().manual_seed(seed)
    logps = [(-scale * torch.rand(rows, generator=generator, dtype=torch.float64) - 50).to(dtype) for _ in range(4)]
    return PairLogps(*logps, torch.rand(rows, generator=generator) < flagged_share, TOKENS)


def columns_of(pairs: PairLogps) -> list[list[float]]:
    return [values.double().tolist() for values in vars(pairs).values() if torch.is_tensor(values)]


def like_the_reference(pairs: PairLogps) -> PairLogps:
    return replace(pairs, reference_positive=pairs.policy_positive, reference_negative=pairs.policy_negative)


def cca_oracle(pairs: PairLogps, beta: float, weight: float) -> float:
    total = 0.0
    columns = columns_of(pairs)
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
        rows = replace(pairs, policy_positive=positive, policy_negative=negative)
        return OBJECTIVES["cca"](beta=0.1, negative_weight=weight)(rows).loss

    assert torch.autograd.gradcheck(loss, policy)


@pytest.mark.parametrize("weight", [0.5, 1.0, 100.0])
def test_cca_at_step_0_is_ln2_times_one_plus_the_mean_weight(weight):
    pairs = random_pairs()
    same = like_the_reference(pairs)
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
        mean_num_tokens=TOKENS,
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
    pairs = PairLogps(extreme, extreme.flip(0), zeros, zeros, torch.tensor([False, True]), TOKENS)
    result = OBJECTIVES["cca"](beta=0.5, negative_weight=10.0)(pairs)
    assert all(math.isfinite(value.item()) for value in result.metrics.values())


@pytest.mark.parametrize(("key", "value"), [("beta", 0.0), ("beta", -0.1), ("negative_weight", 0.0)])
def test_cca_refuses_what_is_not_positive(key, value):
    settings = {"beta": 0.1, "negative_weight": 1.0, key: value}
    with pytest.raises(UserError, match=rf"objective\.{key}: must be greater than 0"):
        OBJECTIVES["cca"](**settings)


def table_3_oracle(name: str, pairs: PairLogps, beta: float, weight: float) -> float:
    total = 0.0
    columns = columns_of(pairs)
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


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# A row's loss by the papers, from the log-ratios of its two images or conditions; its first and last key.
PREFERENCES = {
    "ddo": lambda win, lose, b, a: -math.log(sigma(b * win)) - a * math.log(sigma(-b * lose)),
    "ipo": lambda win, lose, b, _: (win - lose - 1 / (2 * b)) ** 2,
    "kto": lambda win, lose, b, a: (1 - sigma(b * win) + a * (1 - sigma(-b * lose))) / 2,
    "nca": lambda win, lose, b, _: (
        -math.log(sigma(b * win)) - math.log(sigma(-b * win)) / 2 - math.log(sigma(-b * lose)) / 2
    ),
}
# Of one weight; what the second term has.
WEIGHTS = {"ddo": "alpha", "kto": "negative_weight"}
AT_STEP_0 = {"ddo": math.log(2) * 4.0, "ipo": 25.0, "kto": 1.0, "nca": math.log(2) * 2}


def preference(name, beta, weight, **keys):
    return OBJECTIVES[name](beta=beta, **({WEIGHTS[name]: weight} if name in WEIGHTS else {}), **keys)


@pytest.mark.parametrize("name", PREFERENCES)
@pytest.mark.parametrize(("beta", "weight"), [(0.02, 0.3), (0.5, 50.0)])
@pytest.mark.parametrize("flagged_share", [0.0, 0.3, 1.0])
def test_preferences_equal_their_formulas(name, beta, weight, flagged_share):
    pairs = random_pairs(flagged_share=flagged_share)
    positive, negative, theirs, other, flagged = columns_of(pairs)
    rows = [
        # Pairs of images, the only ones of DDO, have no such rows.
        0.0 if flag and name != "ddo" else PREFERENCES[name](win - win_0, lose - lose_0, beta, weight)
        for win, lose, win_0, lose_0, flag in zip(positive, negative, theirs, other, flagged, strict=True)
    ]
    result = preference(name, beta, weight)(pairs)
    assert result.loss.item() == pytest.approx(sum(rows) / len(rows), rel=1e-5)
    assert {**result.metrics, "loss": 0} == {**OBJECTIVES["cca"]()(pairs).metrics, "loss": 0}


@pytest.mark.parametrize("name", PREFERENCES)
def test_preferences_gradients_equal_finite_differences(name):
    pairs = random_pairs(rows=6, dtype=torch.float64)
    policy = [pairs.policy_positive.requires_grad_(), pairs.policy_negative.requires_grad_()]

    def loss(positive, negative):
        rows = replace(pairs, policy_positive=positive, policy_negative=negative)
        return preference(name, 0.1, 3.0, sft_weight=0.7)(rows).loss

    assert torch.autograd.gradcheck(loss, policy)


@pytest.mark.parametrize("name", PREFERENCES)
def test_preferences_at_step_0(name):
    result = preference(name, 0.1, 3.0)(like_the_reference(random_pairs(flagged_share=0)))
    assert result.loss.item() == pytest.approx(AT_STEP_0[name], rel=1e-6)


@pytest.mark.parametrize("name", PREFERENCES)
def test_preferences_stay_finite_far_from_the_reference(name):
    extreme, zeros = torch.tensor([1e4, -1e4]), torch.zeros(2)
    pairs = PairLogps(extreme, extreme.flip(0), zeros, zeros, torch.tensor([False, False]), TOKENS)
    assert math.isfinite(preference(name, 0.5, 10.0)(pairs).loss.item())


@pytest.mark.parametrize(("name", "key"), [(name, key) for name in PREFERENCES for key in ("beta", WEIGHTS.get(name))])
def test_preferences_refuse_what_is_not_positive(name, key):
    if key is not None:
        with pytest.raises(UserError, match=rf"objective\.{key}: must be greater than 0, found 0"):
            OBJECTIVES[name](**{key: 0.0})


PAIRED = [name for name, kind in OBJECTIVES.items() if kind.contrasts]


@pytest.mark.parametrize("name", PAIRED)
def test_every_objective_on_pairs_can_hold_the_likelihood_up(name):
    """The term is next_token's loss on the first rows, also where their condition was dropped."""
    pairs = random_pairs(flagged_share=0.3)
    likelihood = OBJECTIVES["next_token"]()(SequenceLogps(pairs.policy_positive, TOKENS)).loss
    without, with_it = (OBJECTIVES[name](sft_weight=weight)(pairs) for weight in (0.0, 2.5))
    assert (with_it.loss - without.loss).item() == pytest.approx(2.5 * likelihood.item(), rel=1e-4)
    assert with_it.metrics["loss"].item() == with_it.loss.item()
    with pytest.raises(UserError, match=r"objective\.sft_weight: must be greater than or equal to 0, found -1"):
        OBJECTIVES[name](sft_weight=-1.0)


@pytest.mark.parametrize("name", ["dpo", "unlearning"])
def test_the_ablations_gradients_equal_finite_differences(name):
    pairs = random_pairs(rows=6, dtype=torch.float64)
    policy = [pairs.policy_positive.requires_grad_(), pairs.policy_negative.requires_grad_()]

    def loss(positive, negative):
        rows = replace(pairs, policy_positive=positive, policy_negative=negative)
        return build(name, 0.1, 3.0)(rows).loss

    assert torch.autograd.gradcheck(loss, policy)


@pytest.mark.parametrize(("name", "expected"), [("dpo", math.log(2)), ("unlearning", 0.0)])
def test_the_ablations_at_step_0(name, expected):
    result = build(name, 0.1, 3.0)(like_the_reference(random_pairs()))
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
