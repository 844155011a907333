"""events.jsonl: a line an event, of any rank, and no reason to stop."""

import json
import logging
import threading
from types import SimpleNamespace

import pytest

from megatron_cca.training.run_log import EVENTS_FILE, MetricsLog, RunLog, read_events


def test_events_are_appended_with_time_rank_and_restart(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    for event, details in (("saved", {"step": 4}), ("failed", {"error": "it\nbroke"})):
        with RunLog(tmp_path / "run") as log:
            log.own_event(event, **details)
    first, second = read_events(tmp_path / "run")
    assert {name: first[name] for name in ("event", "rank", "restart", "step")} == {
        "event": "saved",
        "rank": 3,
        "restart": 2,
        "step": 4,
    }
    assert first["time"].endswith("+00:00")
    assert second["error"] == "it\nbroke"
    assert (tmp_path / "run" / EVENTS_FILE).read_text().count("\n") == 2


def test_half_a_last_line_is_left_out(tmp_path):
    with RunLog(tmp_path) as log:
        log.own_event("saved", step=4)
    with (tmp_path / EVENTS_FILE).open("a") as file:
        file.write(json.dumps({"event": "saved"})[:-5])
    assert [event["step"] for event in read_events(tmp_path)] == [4]


def test_a_folder_that_cannot_be_written_is_said_once(tmp_path, capsys):
    (tmp_path / "run").write_text("a file")
    with RunLog(tmp_path / "run") as log:
        log.own_event("saved")
        log.own_event("saved")
    assert capsys.readouterr().err.count("events are lost") == 1


def test_rank_0_reports_what_all_ranks_know(tmp_path, capsys):
    with RunLog(tmp_path) as log:
        log.info("on another rank")
        log.event("saved", "saved on another rank", step=4)
        with MetricsLog(tmp_path, 0, 10, tensorboard=False, progress_bar=False) as log.metrics:
            log.info("100 % of a line")
            log.event("saved", "saved at step 5", step=5)
            log.event("removed", steps=[1])
    assert capsys.readouterr().out.splitlines() == ["100 % of a line", "saved at step 5"]
    assert [event["event"] for event in read_events(tmp_path)] == ["saved", "removed"]


def test_a_program_can_listen_and_nothing_is_left_behind(tmp_path, capsys):
    heard, logger = [], logging.getLogger("megatron_cca")
    listener = logging.Handler()
    listener.emit = heard.append
    logger.addHandler(listener)
    try:
        with RunLog(tmp_path) as log:
            log.own_event("hang", step=3)
    finally:
        logger.removeHandler(listener)
    assert [(record.event, record.details) for record in heard] == [("hang", {"step": 3})]
    assert not logger.handlers
    assert logger.propagate


def test_a_blocked_terminal_does_not_block_the_report_of_a_hang(tmp_path):
    blocked, release = threading.Event(), threading.Event()

    def say(line):
        blocked.set()
        release.wait(60)

    with RunLog(tmp_path) as log:
        log.metrics = SimpleNamespace(say=say)
        printing = threading.Thread(target=log.event, args=("saved", "a line"))
        printing.start()
        blocked.wait(60)
        reporting = threading.Thread(target=log.own_event, args=("hang",))
        reporting.start()
        reporting.join(10)
        is_reported = not reporting.is_alive()
        release.set()
        printing.join(60)
        reporting.join(60)
    assert is_reported
    assert {event["event"] for event in read_events(tmp_path)} == {"saved", "hang"}


@pytest.mark.parametrize("folder", ["nothing", "."])
def test_no_events_yet(folder, tmp_path):
    assert read_events(tmp_path / folder) == []
