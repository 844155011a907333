"""A batch in which nothing can be contrasted: undefined metrics are absent, and the run says so."""

import json

import numpy as np
import pytest
import torch

from megatron_cca.config.load import load_config
from megatron_cca.data.shard_writing import Sample
from megatron_cca.data.shards import TokenData, TokenShards
from megatron_cca.lab.evaluation.plots import training_curves
from megatron_cca.lab.studies.running import _means
from megatron_cca.models.emu3 import tiny_vocabulary
from megatron_cca.objectives import OBJECTIVES
from megatron_cca.training.batches import LITTLE, NOTHING, ContrastWatch, has_one_condition
from megatron_cca.training.run_log import MetricsLog, RunLog, read_events, read_metrics
from tests.references.token_shards import write
from tests.unit.test_objectives import build, random_pairs

ALWAYS = {"loss", "positive_log_ratio", "positive_as_negative"}
UNDEFINED = {"negative_log_ratio", "margin", "accuracy"}


def data(folder, *conditions):
    """Shards of one folder for each list of (caption, condition)."""
    folders = []
    for index, rows in enumerate(conditions):
        samples = [Sample(np.zeros((2, 2), int), np.array(caption), condition) for caption, condition in rows]
        folders.append(TokenShards(write(folder / str(index), samples), tiny_vocabulary()))
    return TokenData(folders, [1.0] * len(folders))


@pytest.mark.parametrize("name", ["cca", "dpo", "unlearning"])
def test_undefined_metrics_are_left_out(name):
    objective = build(name, 0.1, 3.0)
    for share, expected in ((1.0, ALWAYS), (0.9, ALWAYS | UNDEFINED), (0.0, ALWAYS | UNDEFINED)):
        metrics = objective(random_pairs(flagged_share=share)).metrics
        assert metrics.keys() == expected
        assert all(torch.isfinite(value) for value in metrics.values())
    assert objective(random_pairs(flagged_share=1.0)).metrics["positive_as_negative"] == 1


def test_the_likelihood_has_its_loss_alone():
    from megatron_cca.objectives import SequenceLogps

    assert OBJECTIVES["next_token"]()(SequenceLogps(torch.ones(2), 1.0)).metrics.keys() == {"loss"}


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ([[([1], None)] * 3], True),
        ([[([1], None)] * 3, [([1], None)]], True),
        ([[([1], None)] * 3, [([2], None)]], False),
        # Several captions of one class: every one would be a negative of its own kind.
        ([[([1], "seven"), ([2], "seven")]], True),
        ([[([1], "seven"), ([2], "eight")]], False),
        ([[([1], "seven")] * 2 + [([1], "eight")]], True),
    ],
)
def test_data_of_one_condition_are_known_before_the_first_step(conditions, expected, tmp_path):
    assert has_one_condition(data(tmp_path, *conditions)) == expected


@pytest.fixture
def told(tmp_path):
    """Feed a watch with shares, and read what it told."""

    def feed(shares, *overrides, conditions=(([1], None), ([2], None)), validation=None):
        config = load_config(None, [*overrides])
        with RunLog(tmp_path) as log, MetricsLog(tmp_path, 0, 10, tensorboard=False, progress_bar=False) as metrics:
            log.metrics = metrics
            watch = ContrastWatch(config, data(tmp_path / "data", conditions))
            watch.begin(log)
            for step, share in enumerate(shares):
                row = {"positive_as_negative": share, "loss": 1.0}
                if validation is not None:
                    row["validation_positive_as_negative"] = validation
                watch.after(step, row, log)
        return [{key: event.get(key) for key in ("event", "step", "reason")} for event in read_events(tmp_path)]

    return feed


def test_one_condition_is_said_before_the_first_step_and_once(told, capsys):
    (event,) = told([1.0] * 20, conditions=[([1], None)] * 3)
    assert event == {
        "event": NOTHING,
        "step": None,
        "reason": "data.path: all 3 samples have the same condition",
    }
    (line,) = capsys.readouterr().out.splitlines()
    assert line == (
        "data.path: all 3 samples have the same condition: nothing to contrast; cca only raises the likelihood of the "
        "images; accuracy, margin and negative log-ratio are undefined and left out"
    )


def test_a_batch_of_one_row_is_said_before_the_first_step(told):
    (event,) = told([1.0] * 3, "training.global_batch_size=1", "training.micro_batch_size=1")
    assert event["reason"].startswith("training.global_batch_size: 1 has no other row")


def test_dpo_is_said_to_learn_nothing(told, capsys):
    told([1.0], "objective.name=dpo")
    assert "dpo learns nothing, its loss is ln 2" in capsys.readouterr().out


def test_a_batch_without_a_negative_is_said_once(told):
    found = told([0.5, 1.0, 1.0, 0.5])
    assert [(event["event"], event["step"]) for event in found] == [(NOTHING, 1)]


def test_nearly_all_rows_are_said_after_some_steps_and_once(told, capsys):
    found = told([0.5] * 10 + [0.95] * 30)
    # Ten steps of 0.5 and 0.95: their mean is 0.9 or more from the ninth of the latter on.
    assert [(event["event"], event["step"]) for event in found] == [(LITTLE, 18)]
    assert "have no negative" in capsys.readouterr().out


def test_a_share_below_that_is_silent(told):
    assert told([0.85] * 40) == []


def test_a_validation_without_a_negative_is_said(told):
    (event,) = told([0.1, 0.1], validation=1.0)
    assert (event["event"], event["step"]) == (NOTHING, 0)
    assert "no row of the validation has a negative" in event["reason"]


def test_logs_and_their_readers_do_without(tmp_path, capsys):
    rows = [
        {"step": 0, "loss": 1.0, "positive_log_ratio": 0.0, "positive_as_negative": 1.0, "samples_per_second": 1.0},
        {"step": 1, "loss": 0.5, "positive_log_ratio": 0.2, "positive_as_negative": 0.5, "samples_per_second": 1.0}
        | dict.fromkeys(UNDEFINED, 0.25),
    ]
    with MetricsLog(tmp_path, 0, 2, tensorboard=False, progress_bar=False) as log:
        for row in rows:
            log.write(row)
    first, second = capsys.readouterr().out.splitlines()
    assert "acc" not in first
    assert "r- " not in first
    assert "nothing to contrast" in first
    assert "acc 0.25" in second
    assert "nothing" not in second
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == rows
    assert _means(read_metrics(tmp_path))["last_accuracy"] == 0.25
    assert _means(rows[:1]).keys() == {"last_loss", "last_positive_log_ratio"}
    for some in (rows, rows[:1]):
        training_curves(tmp_path / "curves.png", some)
