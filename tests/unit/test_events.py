"""events.jsonl: a line an event, of any rank, and no reason to stop."""

import json

import pytest

from megatron_cca.training.events import FILE, EventLog, read_events


def test_events_are_appended_with_time_rank_and_restart(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    EventLog(tmp_path / "run").write("saved", step=4)
    EventLog(tmp_path / "run").write("failed", error="it\nbroke")
    first, second = read_events(tmp_path / "run")
    assert {name: first[name] for name in ("event", "rank", "restart", "step")} == {
        "event": "saved",
        "rank": 3,
        "restart": 2,
        "step": 4,
    }
    assert first["time"].endswith("+00:00")
    assert second["error"] == "it\nbroke"
    assert (tmp_path / "run" / FILE).read_text().count("\n") == 2


def test_half_a_last_line_is_left_out(tmp_path):
    EventLog(tmp_path).write("saved", step=4)
    with (tmp_path / FILE).open("a") as file:
        file.write(json.dumps({"event": "saved"})[:-5])
    assert [event["step"] for event in read_events(tmp_path)] == [4]


def test_a_folder_that_cannot_be_written_is_said_once(tmp_path, capsys):
    (tmp_path / "run").write_text("a file")
    log = EventLog(tmp_path / "run")
    log.write("saved")
    log.write("saved")
    assert capsys.readouterr().err.count("events are lost") == 1


@pytest.mark.parametrize("folder", ["nothing", "."])
def test_no_events_yet(folder, tmp_path):
    assert read_events(tmp_path / folder) == []
