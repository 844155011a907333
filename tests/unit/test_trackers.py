"""Trackers: what Weights & Biases and MLflow keep of a run, read back from the files that the real packages write."""

import json
import subprocess
import sys
import threading
import time
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
from PIL import Image

from megatron_cca.config.load import config_to_dict, load_config
from megatron_cca.errors import Stopped, UserError
from megatron_cca.models import explicit
from megatron_cca.training import trackers
from megatron_cca.training.run_log import LOGGER, MetricsLog, RunLog, read_events, read_metrics
from megatron_cca.training.trackers import IDS_FILE, Trackers, check_trackers
from tests.distributed.launch import ROOT, environment
from tests.references import wandb_file

ARE_MISSING = [name for name in ("wandb", "mlflow") if PathFinder.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(ARE_MISSING), reason=f"not installed: {ARE_MISSING}")
MEASURED = {"loss": 0.1 + 0.2, "grad_norm": 1 / 3, "samples_per_second": 8.0}


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in variables(tmp_path).items():
        monkeypatch.setenv(name, value)


def variables(folder):
    """The environment of a run whose trackers need no network and send nothing."""
    uri = f"sqlite:///{folder}/mlflow.db"
    names = {"WANDB_MODE": "offline", "MLFLOW_TRACKING_URI": uri, "MLFLOW_DISABLE_TELEMETRY": "true"}
    return names | {"WANDB_ERROR_REPORTING": "false", "DO_NOT_TRACK": "true"}


def config_of(folder, *more):
    both = ["logging.wandb=me/images", "logging.mlflow=images"]
    return load_config(None, [f"training.output_dir={folder}/run", *both, *more])


def session(config, folder, steps, *, error=None, alarm=False):
    """What a run does with its log: some steps, a picture, events, and perhaps an error that ends it."""
    output = folder / "run"
    (output / "samples").mkdir(parents=True, exist_ok=True)
    try:
        with RunLog(output) as log, MetricsLog(output, steps[0], 9, tensorboard=False, progress_bar=False) as metrics:
            log.metrics = metrics
            with Trackers(config, log):
                log.event("resumed" if steps[0] else "started", "a headline", step=steps[0])
                for step in steps:
                    # A number that is not finite is one that no tracker takes.
                    metrics.write({"step": step, **MEASURED, "margin": step / 7, "accuracy": float("nan")})
                picture = output / "samples" / f"step_{steps[-1] + 1:07d}.png"
                Image.new("RGB", (6, 4), (255, step, 0)).save(picture)
                metrics.show("samples", picture, steps[-1] + 1)
                if alarm:
                    log.event("alarm", "alarm at step 1: it collapses", step=1, reason="it collapses")
                if error is not None:
                    raise error
    except type(error or UserError("")):
        pass


def wandb_files(folder):
    return sorted((folder / "run" / "wandb").glob("*run-*/*.wandb"))


def of_kind(path, kind):
    return [getattr(one, kind) for one in wandb_file.records(path) if one.WhichOneof("record_type") == kind]


def as_logged(rows):
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


def mlflow_client():
    from mlflow.tracking import MlflowClient

    return MlflowClient()


def check_wandb(path, rows, config, picture):
    logged = [{k: v for k, v in row.items() if not k.startswith("_")} for row in wandb_file.history(path)]
    assert [row for row in logged if "samples.path" not in row] == as_logged(rows)
    (drawn,) = (row for row in logged if "samples.path" in row)
    assert drawn["step"] == rows[-1]["step"] + 1
    assert (path.parent / "files" / drawn["samples.path"]).read_bytes() == picture.read_bytes()
    (run, *_) = of_kind(path, "run")
    assert (run.entity, run.project, run.display_name) == ("me", "images", "run")
    kept = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert {name: kept[name] for name in kept if name != "_wandb"} == config_to_dict(explicit(config))
    (every,) = (one for one in of_kind(path, "metric") if one.glob_name == "*")
    assert every.step_metric == "step"


def test_a_run_is_kept_and_goes_on_where_it_was(offline, tmp_path):
    config = config_of(tmp_path)
    session(config, tmp_path, [0, 1, 2], alarm=True, error=Stopped("a signal", 15))
    before = read_metrics(tmp_path / "run")
    ids = json.loads((tmp_path / "run" / IDS_FILE).read_text())
    client = mlflow_client()
    assert client.get_run(ids["mlflow"]["id"]).info.status == "KILLED"
    # Step 2 was not saved, and is taken again.
    session(config, tmp_path, [2, 3])
    assert json.loads((tmp_path / "run" / IDS_FILE).read_text()) == ids

    first, second = wandb_files(tmp_path)
    pictures = sorted((tmp_path / "run" / "samples").iterdir())
    check_wandb(first, before, config, pictures[0])
    check_wandb(second, read_metrics(tmp_path / "run")[2:], config, pictures[1])
    assert {of_kind(path, "run")[0].run_id for path in (first, second)} == {ids["wandb"]["id"]}
    (alert,) = of_kind(first, "alert")
    assert (alert.title, alert.text, alert.level) == ("alarm", "alarm at step 1: it collapses", "WARN")
    assert of_kind(second, "alert") == []
    assert [of_kind(path, "exit")[0].exit_code for path in (first, second)] == [1, 0]
    events = (first.parent / "files" / "events.jsonl").read_text()
    assert events == (tmp_path / "run" / "events.jsonl").read_text()

    (found,) = client.search_runs([client.get_experiment_by_name("images").experiment_id])
    assert (found.info.run_id, found.info.run_name, found.info.status) == (ids["mlflow"]["id"], "run", "FINISHED")
    for name in (*MEASURED, "margin"):
        points = [(one.step, one.value) for one in client.get_metric_history(found.info.run_id, name)]
        both = [*before, *read_metrics(tmp_path / "run")[2:]]
        assert sorted(points) == sorted((row["step"], row[name]) for row in both)
    assert "accuracy" not in found.data.metrics
    tree = config_to_dict(explicit(config))
    expected = {f"{section}.{name}": value for section, keys in tree.items() for name, value in keys.items()}
    assert found.data.params == {
        name: value if isinstance(value, str) else json.dumps(value) for name, value in expected.items()
    }
    assert found.data.tags["event.alarm"] == "alarm at step 1: it collapses"
    assert found.data.tags["event.resumed"] == "a headline"
    assert sorted(one.path for one in client.list_artifacts(found.info.run_id)) == ["events.jsonl", "samples"]
    for picture in pictures:
        copy = client.download_artifacts(found.info.run_id, f"samples/{picture.name}", str(tmp_path))
        assert Path(copy).read_bytes() == picture.read_bytes()
    copy = client.download_artifacts(found.info.run_id, "events.jsonl", str(tmp_path))
    assert Path(copy).read_text() == events


@pytest.mark.full
def test_another_project_or_a_removed_run_is_begun_anew(offline, tmp_path, monkeypatch):
    """An error that ends the run is told to MLflow, too."""
    session(config_of(tmp_path, "logging.wandb=null"), tmp_path, [0], error=UserError("it broke"))
    first = json.loads((tmp_path / "run" / IDS_FILE).read_text())["mlflow"]["id"]
    assert mlflow_client().get_run(first).info.status == "FAILED"
    session(config_of(tmp_path, "logging.wandb=null", "logging.mlflow=other"), tmp_path, [0])
    second = json.loads((tmp_path / "run" / IDS_FILE).read_text())["mlflow"]["id"]
    assert first != second
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/new.db")
    session(config_of(tmp_path, "logging.wandb=null", "logging.mlflow=other"), tmp_path, [1])
    third = json.loads((tmp_path / "run" / IDS_FILE).read_text())["mlflow"]["id"]
    assert third not in (first, second)
    assert mlflow_client().get_run(third).data.metrics["loss"] == MEASURED["loss"]


class Counting:
    """A tracker that fails at a step, or waits there for ever."""

    def __init__(self, config, fails_at, wait=None):
        self.calls, self.ended, self._fails_at, self._wait = [], None, fails_at, wait

    def scalars(self, step, values):
        if step == self._fails_at:
            if self._wait is not None:
                self._wait.wait(60)
            raise RuntimeError("no route\nto the server")
        self.calls.append(step)

    def picture(self, step, name, file):
        self.calls.append(name)

    def event(self, event, line, details):
        self.calls.append(event)

    def close(self, how):
        self.ended = how


def test_one_that_fails_is_said_once_and_the_other_goes_on(tmp_path, monkeypatch, capsys):
    broken, whole = Counting(None, 1), Counting(None, None)
    monkeypatch.setattr(trackers, "_open_wandb", lambda config: broken)
    monkeypatch.setattr(trackers, "_open_mlflow", lambda config: whole)
    session(config_of(tmp_path), tmp_path, [0, 1, 2, 3])
    assert (broken.calls, broken.ended) == (["started", 0], None)
    assert [one for one in whole.calls if one != "logs_lost"] == ["started", 0, 1, 2, 3, "samples"]
    assert whole.ended == "finished"
    line = "logging.wandb: no route to the server; the run goes on without it"
    assert capsys.readouterr().out.count(line) == 1
    assert [one["reason"] for one in read_events(tmp_path / "run") if one["event"] == "logs_lost"] == [line]
    assert len(read_metrics(tmp_path / "run")) == 4


def test_the_end_of_a_run_waits_for_the_line_about_a_loss(tmp_path, monkeypatch, capsys):
    def late(record):
        time.sleep(0.5 * (threading.current_thread() is not threading.main_thread()))
        return True

    def fails(config):
        raise OSError("no route")

    monkeypatch.setattr(trackers, "_open_mlflow", fails)
    LOGGER.addFilter(late)
    try:
        session(config_of(tmp_path, "logging.wandb=null"), tmp_path, [0])
    finally:
        LOGGER.removeFilter(late)
    assert "logging.mlflow: no route; the run goes on without it" in capsys.readouterr().out


def test_one_that_waits_holds_nothing_up(tmp_path, monkeypatch, capsys):
    release = threading.Event()
    monkeypatch.setattr(trackers, "_open_mlflow", lambda config: Counting(config, 1, release))
    monkeypatch.setattr(trackers, "_SECONDS_TO_END", 0.2)
    monkeypatch.setattr(trackers, "_LONGEST_QUEUE", 6)
    config = config_of(tmp_path, "logging.wandb=null")
    session(config, tmp_path, [0, 1, 2])
    assert "logging.mlflow: has not taken everything 0.2 seconds after the end" in capsys.readouterr().out
    session(config, tmp_path, [*range(20)])
    said = [line for line in capsys.readouterr().out.splitlines() if "logging.mlflow" in line]
    assert said == ["logging.mlflow: is 6 entries behind; the run goes on without it"]
    release.set()


@pytest.mark.parametrize("text", ["[]", "{", '{"mlflow": {"id": 3, "where": "images"}}'])
def test_a_file_of_ids_that_no_run_wrote_is_named(text, tmp_path, offline, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / IDS_FILE).write_text(text)
    session(config_of(tmp_path, "logging.wandb=null"), tmp_path, [0])
    said = [line for line in capsys.readouterr().out.splitlines() if "logging.mlflow" in line]
    assert len(said) == 1
    assert f"{IDS_FILE}: is not the file of ids that a run writes; remove it" in said[0]
    assert (tmp_path / "run" / IDS_FILE).read_text() == text


@pytest.mark.parametrize("name", ["a/b/c", "/a", "a/", "/"])
def test_what_is_no_project_is_refused(name):
    with pytest.raises(UserError, match=f"logging.wandb: {name}: must be a project, or an entity and a project"):
        check_trackers(load_config(None, [f"logging.wandb={name}"]).logging)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_named_with_its_extra(name, monkeypatch, tmp_path):
    config = load_config(None, [f"logging.{name}=images"]).logging
    check_trackers(config)
    # A folder of that name, such as the one with a run's files, is no package.
    (tmp_path / name).mkdir()
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    with pytest.raises(UserError, match=rf"logging.{name}: needs .* pip install 'megatron-cca\[trackers\]'"):
        check_trackers(config)


@pytest.mark.full
def test_megatron_does_without_wandb_and_others_need_not():
    code = """import sys
from megatron_cca import platform
platform.install("cpu")
assert "megatron.core.timers" in sys.modules and "wandb" not in sys.modules
import wandb
assert wandb.init and sys.modules["megatron.core.timers"].wandb is None
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, env=environment(), cwd=ROOT, timeout=300)
