"""Standard streams that go away: a training run goes on, a tool ends in one line."""

import errno
import os
import pty
import signal
import subprocess
import sys

import pytest

from megatron_cca.terminal import OutputClosed, guarded, report_losses_to

RUN = """
import sys
from megatron_cca.reporting import {reported}
from megatron_cca.terminal import report_losses_to
told = open({told!r}, "w")
with {reported}({arguments}), report_losses_to(lambda *what: print(*what, file=told, flush=True)):
    sys.stdin.readline()
    for number in range(3):
        print("line", number, flush=True)
        print("bar", number, file=sys.stderr, flush=True)
    import os
    os.system("echo from a child")
    print("done", file=told, flush=True)
"""


def started(reported, tmp_path, **streams):
    arguments = "()" if reported == "reported_tool_errors" else ""
    code = RUN.format(reported=reported, arguments=arguments, told=str(tmp_path / "told"))
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, text=True, **streams)


def closed_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def told(tmp_path):
    return (tmp_path / "told").read_text().splitlines()


@pytest.mark.parametrize("both", [False, True])
def test_a_run_goes_on_when_its_pipe_is_closed(both, tmp_path):
    pipe = closed_pipe()
    job = started("reported_errors", tmp_path, stdout=pipe, stderr=pipe if both else subprocess.PIPE)
    _, said = job.communicate("\n", timeout=60)
    assert job.returncode == 0
    assert said in (None, "bar 0\nbar 1\nbar 2\n")
    expected = ["standard output Broken pipe", *["standard error Broken pipe"] * both, "done"]
    assert told(tmp_path) == expected


@pytest.mark.parametrize("both", [False, True])
def test_a_tool_ends_in_one_line_when_its_pipe_is_closed(both, tmp_path):
    pipe = closed_pipe()
    job = started("reported_tool_errors", tmp_path, stdout=pipe, stderr=pipe if both else subprocess.PIPE)
    _, said = job.communicate("\n", timeout=60)
    assert job.returncode == 128 + signal.SIGPIPE
    assert said in (None, "megatron_cca: standard output is closed, and nobody reads on; ended\n")
    assert told(tmp_path) == []


@pytest.mark.parametrize("reported", ["reported_errors", "reported_tool_errors"])
def test_a_terminal_that_is_gone_and_a_full_disk_stop_nothing(reported, tmp_path):
    ours, theirs = pty.openpty()
    # Not its controlling terminal, so that no signal comes along.
    job = started(reported, tmp_path, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    os.close(ours)
    job.communicate("\n", timeout=60)
    assert job.returncode == 0
    assert told(tmp_path)[-1] == "done"
    with open("/dev/full", "w") as full:  # noqa: PTH123
        job = started(reported, tmp_path, stdout=full, stderr=subprocess.PIPE)
        _, said = job.communicate("\n", timeout=60)
    assert (job.returncode, said.splitlines()[:3]) == (0, ["bar 0", "bar 1", "bar 2"])
    assert told(tmp_path) == ["standard output No space left on device", "done"]


def test_streams_that_were_closed_before_the_start_are_no_file_of_ours(tmp_path):
    code = RUN.format(reported="reported_errors", arguments="", told=str(tmp_path / "told"))
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        ["bash", "-c", 'exec "$@" >&- 2>&-', "bash", *command], stdin=subprocess.DEVNULL, timeout=60, check=False
    )
    assert done.returncode == 0
    assert "line" not in (tmp_path / "told").read_text()


class Failing:
    """A stream that meets an error now and then, and has no descriptor."""

    def __init__(self, *errors):
        self.errors, self.written = list(errors), []

    def write(self, text):
        number = self.errors.pop(0) if self.errors else None
        if number is not None:
            raise OSError(number, os.strerror(number))
        self.written.append(text)

    def flush(self):
        pass


def test_a_disk_with_room_again_is_written_to(monkeypatch):
    stream, losses = Failing(None, errno.ENOSPC, errno.EAGAIN, None), []
    monkeypatch.setattr(sys, "stdout", stream)
    with guarded(ends=True), report_losses_to(lambda *what: losses.append(what)):
        for text in "abcd":
            sys.stdout.write(text)
    assert stream.written == ["a", "d"]
    assert losses == [("standard output", "No space left on device")]
    assert sys.stdout is stream


def test_a_closed_pipe_is_met_once(monkeypatch):
    stream = Failing(errno.EPIPE, errno.EPIPE)
    monkeypatch.setattr(sys, "stdout", stream)
    with guarded(ends=True):
        with pytest.raises(OutputClosed, match="standard output is closed"):
            print("a")
        print("b")
