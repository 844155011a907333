"""Validation is the objective on samples that training never sees, the same for every layout, and leaves no trace."""

import math

import numpy as np
import pytest
import torch

from megatron_cca.config.load import load_config
from megatron_cca.training.batches import open_data, training_batches, validation_batches
from tests.distributed.launch import run_workers
from tests.distributed.test_layout_parity import CCA, CP2, LOSS_RTOL, PP2, SIZED_BY_PRESET, TP2, TP2_SP, VPP2, under
from tests.distributed.test_layout_parity import initial_weights as initial_weights
from tests.references import emu3
from tests.selection import Computed

STEPS = 4
VALIDATION = ["validation.interval=2", "validation.fraction=0.02"]
# A step has 8 samples: 28 of 1,437 are held out, which fills three batches.
ITERS = 3
BY_RANKS = {
    1: {"one process": [], "micro batch 1": ["training.micro_batch_size=1"]},
    2: {"TP 2": TP2, "PP 2": PP2, "PP 2 x VPP 2": VPP2, "CP 2": CP2, "DP 2": ["training.micro_batch_size=2"]},
}
OF_VAR = {
    1: {name: BY_RANKS[1][name] for name in ("one process", "micro batch 1")},
    2: {"TP 2 + SP": TP2_SP, "DP 2": BY_RANKS[2]["DP 2"]},
}
JOBS = {"Emu3": BY_RANKS, "VAR": OF_VAR}


@pytest.fixture(scope="module")
def common(digit_shards):
    return [*CCA, f"data.path={digit_shards}", *VALIDATION]


@pytest.fixture(scope="module")
def models(common, tiny_var):
    return {"Emu3": common, "VAR": [*SIZED_BY_PRESET, *tiny_var, *VALIDATION]}


@pytest.fixture(scope="module")
def answers(models, tmp_path_factory):
    """By family: what each layout answers."""

    def compute(family):
        found = {}
        for ranks, layouts in JOBS[family].items():
            settings = {"common": models[family], "layouts": layouts, "steps": STEPS}
            found |= run_workers(ranks, "validations", settings, tmp_path_factory.mktemp(f"ranks{ranks}"))
        return {family: found}

    return Computed(compute)


@pytest.mark.parametrize(
    ("family", "layout"),
    [(family, name) for family, jobs in JOBS.items() for layouts in jobs.values() for name in layouts],
)
def test_every_layout_has_the_same_validation_metrics(answers, family, layout):
    found, expected = answers[family][layout], answers[family]["one process"]
    assert found["before"]["loss"] != found["after"]["loss"]
    for moment in ("before", "after"):
        assert found[moment].keys() == expected[moment].keys()
        for name, value in expected[moment].items():
            assert found[moment][name] == pytest.approx(value, rel=1e-3 if "ratio" in name else LOSS_RTOL, abs=1e-4)
    torch.testing.assert_close(*(torch.tensor(a["losses"]) for a in (found, expected)), rtol=LOSS_RTOL, atol=0)


@pytest.mark.parametrize("family", JOBS)
def test_before_the_first_step_the_loss_is_known(answers, models, family):
    config = load_config(None, models[family])
    validation = validation_batches(config, open_data(config), with_pairs=True)
    assert validation.iters == ITERS
    flags = [validation.batches.pairing.at(step).negative_is_positive for step in range(ITERS)]
    weight, share = config.objective.negative_weight, float(np.concatenate(flags).mean())
    before = answers[family]["one process"]["before"]
    assert before["loss"] == pytest.approx(math.log(2) * (1 + share + (1 - share) * weight) / weight, rel=1e-6)
    assert before["positive_log_ratio"] == 0.0


@pytest.mark.parametrize("family", JOBS)
def test_validating_changes_nothing_in_training(answers, models, family, tmp_path):
    settings = {"common": models[family], "layouts": {"without": ["validation.interval=0"]}, "steps": STEPS}
    without = run_workers(1, "validations", settings, tmp_path)["without"]
    assert without["losses"] == answers[family]["one process"]["losses"]
    assert without["before"] is None


def test_next_token_validation_equals_an_independent_model(common, initial_weights, tmp_path):
    _, architecture, weights = initial_weights
    overrides = [*under("next_token", common), "training.micro_batch_size=8", "model.attention_dropout=0.3"]
    found = run_workers(1, "validations", {"common": overrides, "layouts": {"dropout": []}, "steps": 0}, tmp_path)
    config = load_config(None, overrides)
    validation = validation_batches(config, open_data(config), with_pairs=False)
    logps, tokens = [], 0
    for step in range(ITERS):
        (rows,) = validation.batches.build(step, 0, 1).microbatches
        logps.append(emu3.image_logps(weights, rows, architecture))
        tokens += int(rows.mask.sum())
    # Nothing is dropped while validating.
    assert found["dropout"]["before"]["loss"] == pytest.approx(float(-torch.cat(logps).sum() / tokens), rel=1e-5)


def test_validation_may_have_shards_of_its_own(digit_shards, tmp_path):
    own = [*CCA, f"data.path={digit_shards}", f"validation.path={digit_shards}", "validation.interval=1"]
    config = load_config(None, own)
    data = open_data(config)
    validation = validation_batches(config, data, with_pairs=True)
    assert validation.iters == 1437 // 8
    assert validation_batches(load_config(None, [*own, "validation.iters=2"]), data, with_pairs=True).iters == 2
    kept = training_batches(config, data, with_pairs=True).pairing.order.pools
    assert [len(pool) for pool in kept] == [1437]
