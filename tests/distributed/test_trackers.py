"""Trackers beside a whole run: rank 0 alone reports, no number changes, and a server that is away stops nothing."""

import json
import sqlite3

import pytest

from megatron_cca.training.run_log import read_events, read_metrics
from megatron_cca.training.trackers import IDS_FILE
from tests.distributed.launch import SCRIPT, ended, start_job
from tests.distributed.test_faults import STEPS, arguments, losses, stderr
from tests.references import wandb_file
from tests.unit.test_trackers import as_logged, pytestmark, variables, wandb_files

__all__ = ["pytestmark"]
BOTH = {"logging.wandb": "images", "logging.mlflow": "images", "training.save_interval": 2}


def trained(data, folder, environment, **settings):
    folder.mkdir(exist_ok=True)
    jobs = start_job(2, SCRIPT, *arguments(data, **settings), cwd=folder, **environment)
    assert ended(jobs, 240) == [0, 0], stderr(folder, 0)
    return losses(folder)


def logged(folder):
    paths = wandb_files(folder)
    rows = [row for path in paths for row in wandb_file.history(path)]
    return [{name: value for name, value in row.items() if not name.startswith("_")} for row in rows]


@pytest.fixture(scope="module")
def without(digit_shards, tmp_path_factory):
    return trained(digit_shards, tmp_path_factory.mktemp("without"), {}, **{"training.save_interval": 2})


@pytest.mark.full
def test_one_rank_reports_and_no_number_changes(without, digit_shards, tmp_path):
    """Also where the run is continued."""
    names = variables(tmp_path)
    trained(digit_shards, tmp_path, names, **BOTH, **{"training.train_iters": STEPS - 2})
    assert trained(digit_shards, tmp_path, names, **BOTH) == without
    assert len(wandb_files(tmp_path)) == 2
    assert logged(tmp_path) == as_logged(read_metrics(tmp_path / "run"))
    ids = json.loads((tmp_path / "run" / IDS_FILE).read_text())
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        assert database.execute("select run_uuid, status from runs").fetchall() == [(ids["mlflow"]["id"], "FINISHED")]
        points = database.execute("select step, value from metrics where key = 'loss' order by step").fetchall()
    assert points == [(row["step"], row["loss"]) for row in read_metrics(tmp_path / "run")]
    assert "logs_lost" not in [one["event"] for one in read_events(tmp_path / "run")]


@pytest.mark.full
def test_a_server_that_is_away_is_said_once_and_no_number_changes(without, digit_shards, tmp_path):
    away = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": 1}
    away |= {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": 40 * "a", "WANDB_INIT_TIMEOUT": 3}
    names = variables(tmp_path) | {"WANDB_MODE": "online"} | away
    assert trained(digit_shards, tmp_path, names, **BOTH) == without
    lost = [one["reason"] for one in read_events(tmp_path / "run") if one["event"] == "logs_lost"]
    assert sorted(line.partition(": ")[0] for line in lost) == ["logging.mlflow", "logging.wandb"]
    said = (tmp_path / "rank0.out").read_text().splitlines()
    assert sorted(line for line in said if line.startswith("logging.")) == sorted(lost)
    assert "Traceback" not in stderr(tmp_path, 0)
