"""How programs end when several ranks meet the same mistake."""

import os
import signal
import subprocess
import sys
import time

import pytest

from megatron_cca import reporting

REFUSING = """
from megatron_cca.errors import UserError
from megatron_cca.reporting import reported_tool_errors
with reported_tool_errors(()):
    print("refusing", flush=True)
    raise UserError("--prompts: no such file")
"""


def test_a_rank_that_waits_for_rank_0_to_speak_is_ended_without_another_word():
    environment = {**os.environ, "RANK": "1"}
    rank = subprocess.Popen(
        [sys.executable, "-c", REFUSING], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert rank.stdout.readline() == "refusing\n"
    time.sleep(0.5)
    rank.send_signal(signal.SIGTERM)
    assert rank.communicate(timeout=10)[1] == ""
    assert rank.returncode == -signal.SIGTERM


class Ended(BaseException):
    """In place of the process's end."""


@pytest.fixture
def end(monkeypatch):
    """The wait and the status that a failing rank ends with."""
    waits = []

    def leave(status):
        raise Ended(status, *waits)

    monkeypatch.setattr(reporting, "end_process", leave)
    # Those of this process are the ranks of other tests.
    monkeypatch.setattr(reporting.multiprocessing, "active_children", list)
    monkeypatch.setattr(reporting, "_wait_to_be_ended", waits.append)
    monkeypatch.setenv("RANK", "1")

    def of(error):
        with pytest.raises(Ended) as ended, reporting.reported_errors():
            raise error
        return ended.value.args

    return of


def test_a_rank_that_lost_another_waits_as_long_as_it_is_told(end, monkeypatch, capsys):
    lost, own = RuntimeError("gloo: Connection closed by peer"), RuntimeError("boom")
    assert end(lost) == (1, 20.0)
    monkeypatch.setenv("MEGATRON_CCA_PEER_WAIT_SECONDS", "0.5")
    assert end(lost) == (1, 20.0, 0.5)
    assert end(own) == (1, 20.0, 0.5)
    monkeypatch.setenv("RANK", "0")
    for bad in ("soon", "-1", "nan", "inf"):
        monkeypatch.setenv("MEGATRON_CCA_PEER_WAIT_SECONDS", bad)
        capsys.readouterr()
        assert end(own)[0] == 2
        assert capsys.readouterr().err == (
            "megatron_cca: error: MEGATRON_CCA_PEER_WAIT_SECONDS: must be a number of seconds, 0 or more, found "
            f"{bad!r}\n"
        )


WAITING = """
import time
from megatron_cca.reporting import reported_tool_errors
with reported_tool_errors(()):
    print("waiting", flush=True)
    time.sleep(2)
    print("done", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGQUIT, signal.SIGINT])
@pytest.mark.parametrize("is_ignored", [False, True])
def test_a_signal_ends_a_tool_in_one_line_unless_nohup_or_a_shell_has_it_ignored(number, is_ignored):
    goes_on = is_ignored and number != signal.SIGTERM
    ignoring = ["env", f"--ignore-signal={number.name[3:]}"] if is_ignored else []
    command = [*ignoring, sys.executable, "-c", WAITING]
    tool = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert tool.stdout.readline() == "waiting\n"
    tool.send_signal(number)
    said, error = tool.communicate(timeout=30)
    expected = (0, "done\n", "") if goes_on else (130, "", "megatron_cca: interrupted\n")
    assert (tool.returncode, said, error) == expected


@pytest.mark.parametrize(("ignored", "expected"), [([], "{}"), (["HUP"], "SIGTERM,SIGINT,SIGQUIT")])
def test_a_torchrun_ignores_what_nohup_has_ignored(ignored, expected):
    code = "from megatron_cca.terminal import launcher_environment as found; print(found())"
    command = ["env", *(f"--ignore-signal={name}" for name in ignored), sys.executable, "-c", code]
    assert expected in subprocess.run(command, capture_output=True, text=True, check=True).stdout
