"""A run that is asked to go by any signal, or loses what is around it: it saves and says so, or goes on."""

import os
import shutil
import signal
import subprocess
import time

import pytest

from tests.distributed.launch import LIMIT, SCRIPT, ended, environment, run_alone, run_tool, start_job
from tests.distributed.test_faults import (
    SLOW_STEPS,
    STEPS,
    TP2,
    arguments,
    events,
    injected,
    losses,
    named,
    running,
    saved,
    stderr,
)
from tests.selection import mostly_full

PP2 = {"parallel.pipeline_model_parallel_size": 2}
SIGNALS = [signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR2, signal.SIGXCPU]
ENDLESS = {"training.train_iters": 100000, "faults.hang_timeout_seconds": 0}


@pytest.mark.parametrize("number", mostly_full(SIGNALS, [signal.SIGHUP]))
def test_every_signal_that_asks_to_go_saves(number, digit_shards, tmp_path):
    script = injected(tmp_path, SLOW_STEPS)
    with running(1, script, *arguments(digit_shards), cwd=tmp_path, at_step=1) as jobs:
        os.kill(jobs[0].pid, number)
        assert ended(jobs, 60) == [128 + number]
    (step,) = saved(tmp_path)
    assert 0 < step < STEPS
    assert stderr(tmp_path, 0).splitlines()[-1] == (
        f"megatron_cca: {number.name}: step {step} is saved in run; the same command continues"
    )
    assert named(tmp_path) == ["started", "saved", "stopped"]
    # Others than Ctrl-C need no word from whom they come.
    assert ("Ctrl-C again ends it at once" in stderr(tmp_path, 0)) == (number == signal.SIGINT)


@pytest.mark.full
def test_a_second_ctrl_c_ends_the_run_at_once(digit_shards, tmp_path):
    script = injected(tmp_path, SLOW_STEPS.replace("0.5", "60 * (run.iteration == 1)"))
    with running(1, script, *arguments(digit_shards), cwd=tmp_path, at_step=1) as jobs:
        os.kill(jobs[0].pid, signal.SIGINT)
        time.sleep(1.5)
        assert jobs[0].is_alive()
        os.kill(jobs[0].pid, signal.SIGINT)
        assert ended(jobs, 30) == [130]
    assert stderr(tmp_path, 0).splitlines()[-1] == "megatron_cca: interrupted"
    assert saved(tmp_path) == []


def test_a_signal_that_nohup_has_ignored_stops_nothing(digit_shards, tmp_path):
    ignored = "import signal\n    signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    script = injected(tmp_path, SLOW_STEPS.replace("import time", f"import time\n    {ignored}"))
    with running(1, script, *arguments(digit_shards), cwd=tmp_path, at_step=1) as jobs:
        os.kill(jobs[0].pid, signal.SIGHUP)
        assert ended(jobs, 60) == [0]
    assert len(losses(tmp_path)) == STEPS


@pytest.mark.full
@pytest.mark.parametrize("command", [["nohup", "bash"], ["bash"]])
def test_a_terminal_that_closes_on_two_processes(command, digit_shards, tmp_path):
    """Under nohup the run goes on, until it is asked to go; without, it saves and goes."""
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(
            [*command, SCRIPT, *arguments(digit_shards, **ENDLESS)],
            cwd=tmp_path,
            env={**environment(), "NPROC_PER_NODE": "2"},
            stdout=log,
            stderr=log,
        )
        try:
            steps = wait_for_steps(tmp_path, 3, job)
            job.send_signal(signal.SIGHUP)
            if command[0] == "nohup":
                wait_for_steps(tmp_path, steps + 20, job)
                assert saved(tmp_path) == []
                job.send_signal(signal.SIGTERM)
            assert job.wait(120) == 128 + (signal.SIGTERM if command[0] == "nohup" else signal.SIGHUP)
        finally:
            job.terminate()
            job.wait(60)
    assert len(saved(tmp_path)) == 1
    assert named(tmp_path) == ["started", "saved", "stopped"]


def wait_for_steps(folder, number, job):
    metrics, deadline = folder / "run" / "metrics.jsonl", time.monotonic() + LIMIT
    while True:
        steps = metrics.read_text().count("\n") if metrics.exists() else 0
        if steps >= number:
            return steps
        assert time.monotonic() < deadline
        assert job.poll() is None, (folder / "log").read_text()
        time.sleep(0.1)


AT_STEP_3 = """
    import megatron_cca.training.loop as loop
    take = loop.train_step
    def losing(run):
        if run.iteration == 3:
            {loss}
        return take(run)
    loop.train_step = losing
"""


def lose(loss, data, folder, **settings):
    script = injected(folder, AT_STEP_3.replace("{loss}", loss))
    done = run_alone(script, *arguments(data, **settings), cwd=folder)
    assert done.returncode == 0, done.stderr
    assert saved(folder)[-1] == STEPS
    assert named(folder)[-1] == "finished"
    return done


def reasons(folder, event):
    return [found["reason"] for found in events(folder) if found["event"] == event]


def test_folders_that_are_removed_stop_nothing(digit_shards, tmp_path):
    """All of the run and its data at once: what is logged after that is there."""
    data = shutil.copytree(digit_shards, tmp_path / "data")
    loss = f"import shutil; shutil.rmtree('run'); shutil.rmtree({str(data)!r})"
    done = lose(loss, data, tmp_path, **{"training.save_interval": 2, "logging.tensorboard": "true"})
    assert saved(tmp_path) == [4, 6, 8]
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == STEPS - 3
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))
    told = ["metrics.jsonl: was removed or replaced; it goes on with step 3", "tensorboard: was removed; it goes on"]
    printed = [line for line in done.stdout.splitlines() if "removed" in line]
    for expected, event, line in zip(told, reasons(tmp_path, "logs_lost"), printed, strict=True):
        assert expected in event
        assert expected in line


CUT = {"one process": (1, {}), "TP 2": (2, TP2), "DP 2": (2, {}), "PP 2": (2, PP2)}


@pytest.mark.parametrize("layout", mostly_full(CUT, ["TP 2"]))
def test_data_that_are_cut_short_cost_no_step(layout, digit_shards, tmp_path):
    """A memory map would end the process with SIGBUS; one rank reads, and all save."""
    ranks, settings = CUT[layout]
    data = shutil.copytree(digit_shards, tmp_path / "data")
    script = injected(tmp_path, AT_STEP_3.replace("{loss}", f"import os; os.truncate({str(data / 'codes.bin')!r}, 16)"))
    options = arguments(data, **settings)
    assert ended(start_job(ranks, script, *options, cwd=tmp_path), 120) == [2] * ranks
    said = stderr(tmp_path, 0).splitlines()[-1]
    (step,) = saved(tmp_path)
    assert 3 < step < STEPS
    assert "codes.bin: sample " in said
    assert said.endswith(
        f": is shorter than it was when the run began; step {step} is saved in run; mend it, then the same command "
        "continues"
    )
    shutil.copy(digit_shards / "codes.bin", data / "codes.bin")
    done = run_tool(SCRIPT, *arguments(data), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path)) == STEPS
    first = [event["event"] for event in events(tmp_path) if event["rank"] == 0]
    assert first == ["started", "saved", "failed", "resumed", "saved", "finished"]


CLOSE = "import os; ends = os.pipe(); os.close(ends[0]); os.dup2(ends[1], 1)"


@pytest.mark.parametrize("loss", mostly_full([CLOSE, f"{CLOSE}; os.dup2(1, 2)"], [CLOSE]))
def test_a_pipe_that_is_closed_stops_nothing(loss, digit_shards, tmp_path):
    done = lose(loss, digit_shards, tmp_path)
    assert len(losses(tmp_path)) == STEPS
    lost = reasons(tmp_path, "output_lost")
    assert lost[0] == ("standard output cannot be written (Broken pipe); the run goes on, its logs are in its folder")
    if loss == CLOSE:
        assert lost == lost[:1]
        assert f"megatron_cca: {lost[0]}\n" in done.stderr
    else:
        assert lost[1].startswith("standard error cannot be written")
