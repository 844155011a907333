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
with reported_tool_errors((), ""):
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
