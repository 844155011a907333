"""Faults injected into the program itself: signals, a stopped rank, a stalled loader, NaN, a full disk, kills."""

import json
import os
import signal
import subprocess
import textwrap
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from megatron_cca.checkpoint import layout
from megatron_cca.checkpoint.integrity import check_whole
from megatron_cca.training.run_log import read_events
from tests import soak
from tests.distributed.launch import LIMIT, SCRIPT, end_job, ended, run_alone, run_tool, start_job, torchrun
from tests.references.small_disk import mounted

STEPS = 8
TP2 = {"parallel.tensor_model_parallel_size": 2}


def arguments(data, **settings):
    short = {
        "data.path": data,
        "training.pretrained_checkpoint": "null",
        "training.output_dir": "run",
        "training.train_iters": STEPS,
        "training.micro_batch_size": 2,
        "training.global_batch_size": 4,
        "logging.tensorboard": "false",
        **settings,
    }
    return [part for key, value in short.items() for part in ("--set", f"{key}={value}")]


def losses(folder):
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(len(rows)))
    return [row["loss"] for row in rows]


def events(folder):
    return read_events(folder / "run")


def named(folder):
    return [event["event"] for event in events(folder)]


def saved(folder):
    return layout.iterations(folder / "run" / layout.FOLDER)


def stderr(folder, rank):
    return (folder / f"rank{rank}.err").read_text()


def injected(folder, code):
    """A script that is the program with ``code`` run before it."""
    script = folder / "injected.py"
    script.write_text(
        f"import runpy\n{textwrap.dedent(code)}\nif __name__ == '__main__':\n"
        f"    runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    return script


@contextmanager
def running(ranks, script, *options, cwd, at_step, **variables):
    """A job that has taken some steps."""
    jobs = start_job(ranks, Path(script), *options, cwd=cwd, **variables)
    metrics, deadline = cwd / "run" / "metrics.jsonl", time.monotonic() + LIMIT
    try:
        while not metrics.exists() or metrics.read_text().count("\n") < at_step:
            assert time.monotonic() < deadline, stderr(cwd, 0)
            assert all(job.is_alive() for job in jobs), "".join(stderr(cwd, rank) for rank in range(ranks))
            time.sleep(0.02)
        yield jobs
    finally:
        end_job(jobs)


@pytest.fixture(scope="module")
def uninterrupted(digit_shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    done = run_tool(SCRIPT, *arguments(digit_shards), cwd=folder)
    assert done.returncode == 0, done.stderr
    assert named(folder) == ["started", "saved", "finished"]
    return losses(folder)


# So that all are not taken before a busy machine gets to the signal.
SLOW_STEPS = """
    import time
    from megatron_cca.training import loop
    take = loop.train_step
    def slowly(run):
        time.sleep(0.5)
        return take(run)
    loop.train_step = slowly
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_stop_signal_to_any_rank_saves_and_the_same_command_continues(
    number, status, uninterrupted, digit_shards, tmp_path
):
    options = arguments(digit_shards)
    script = injected(tmp_path, SLOW_STEPS)
    # A step is told of before it is asked whether to stop: the signal may come between the two.
    with running(2, script, *arguments(digit_shards, **TP2), cwd=tmp_path, at_step=3) as jobs:
        os.kill(jobs[1].pid, number)
        assert ended(jobs, 60) == [status, status]
    (step,) = saved(tmp_path)
    assert 2 < step < STEPS
    assert stderr(tmp_path, 0).splitlines()[-1] == (
        f"megatron_cca: {number.name}: step {step} is saved in run; the same command continues"
    )
    assert [*layout.iteration_folder(tmp_path / "run" / layout.FOLDER, step).parent.glob(".*")] == []
    done = run_tool(SCRIPT, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path) == pytest.approx(uninterrupted, rel=1e-5)
    assert named(tmp_path) == ["started", "saved", "stopped", "resumed", "saved", "finished"]
    assert events(tmp_path)[2]["signal"] == number.name


def test_a_killed_rank_lets_the_other_end_by_itself(digit_shards, tmp_path):
    """Also without a launcher that would end it, and with its own words: it has lost a peer."""
    options = arguments(digit_shards, **TP2, **{"training.train_iters": 10000})
    with running(2, SCRIPT, *options, cwd=tmp_path, at_step=2, MEGATRON_CCA_PEER_WAIT_SECONDS=0.5) as jobs:
        os.kill(jobs[1].pid, signal.SIGKILL)
        jobs[0].join(60)
        assert jobs[0].exitcode == 1
    said = stderr(tmp_path, 0)
    assert "megatron_cca: rank 0 failed\n" in said
    assert "closed by peer" in said.lower() or "reset by peer" in said.lower()


def test_a_stopped_rank_is_noticed_within_the_time_out(digit_shards, tmp_path):
    timeout = 4
    options = arguments(digit_shards, **TP2, **{"training.train_iters": 10000, "faults.hang_timeout_seconds": timeout})
    with running(2, SCRIPT, *options, cwd=tmp_path, at_step=2) as jobs:
        os.kill(jobs[1].pid, signal.SIGSTOP)
        started = time.monotonic()
        jobs[0].join(60)
        assert jobs[0].exitcode == 1
        assert time.monotonic() - started < 3 * timeout
        last = stderr(tmp_path, 0).splitlines()[-1]
    assert "no sign of life from rank 1: stopped or gone" in last
    assert last.startswith("megatron_cca: no progress for ")
    (hang,) = [event for event in events(tmp_path) if event["event"] == "hang"]
    assert "train_step" in "".join(hang["stack"]) or "all_reduce" in "".join(hang["stack"])


def test_a_stalled_loader_is_found_with_its_stack(digit_shards, tmp_path):
    """Data parallel: rank 0 has its batch and waits for rank 1 in a collective."""
    script = injected(
        tmp_path,
        """
        import os, time
        from megatron_cca.data.microbatches import BatchBuilder
        read, turns = BatchBuilder.sequences, []
        def stalled_disk(self, plan, rank, size):
            turns.append(plan)
            if os.environ["RANK"] == "1" and len(turns) == 4:
                time.sleep(1000)
            return read(self, plan, rank, size)
        BatchBuilder.sequences = stalled_disk
        """,
    )
    options = arguments(digit_shards, **{"training.train_iters": 10000, "faults.hang_timeout_seconds": 4})
    with running(2, script, *options, cwd=tmp_path, at_step=3) as jobs:
        jobs[1].join(60)
        assert jobs[1].exitcode == 1
    said = stderr(tmp_path, 1)
    assert (
        "in step 3, reading the batch: waiting for rank 1, still in step 3, reading the batch" in said.splitlines()[-1]
    )
    assert "stalled_disk" in said
    assert events(tmp_path)[-1]["rank"] == 1


NAN_GRADIENTS = """
    import megatron_cca.training.loop as loop
    set_up = loop.set_up
    def poisoned(config, data):
        run = set_up(config, data)
        weight = run.policy_chunks[0].decoder.layers[1].mlp.linear_fc1.weight
        weight.register_hook(lambda g: g * float("nan") if run.iteration in {steps} else g)
        return run
    loop.set_up = poisoned
"""
LINE = "step 3: gradients: NaN or infinity on rank 0 in layer 1 (1 tensor), first in decoder.layers.1.mlp.linear_fc1."


def test_nan_stops_the_run_before_the_update(digit_shards, tmp_path):
    script = injected(tmp_path, NAN_GRADIENTS.replace("{steps}", "{3}"))
    done = run_alone(script, *arguments(digit_shards, **{"training.save_interval": 1}), cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"megatron_cca: error: {LINE}")
    assert "Traceback" not in done.stderr
    assert saved(tmp_path) == [1, 2, 3]
    assert named(tmp_path)[-1] == "failed"
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[3])["grad_norm"] is None


def test_nan_is_skipped_where_that_is_wanted(digit_shards, tmp_path):
    script = injected(tmp_path, NAN_GRADIENTS.replace("{steps}", "{3}"))
    done = run_alone(script, *arguments(digit_shards, **{"faults.non_finite": "skip"}), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert LINE in done.stdout
    assert "; this update is left out" in done.stdout
    assert [event["step"] for event in events(tmp_path) if event["event"] == "skipped_step"] == [3]
    assert len(losses(tmp_path)) == STEPS


def test_too_many_skipped_in_a_row_stop_the_run(digit_shards, tmp_path):
    script = injected(tmp_path, NAN_GRADIENTS.replace("{steps}", "range(2, 99)"))
    options = {"faults.non_finite": "skip", "faults.max_skipped_steps": 2}
    done = run_alone(script, *arguments(digit_shards, **options), cwd=tmp_path)
    assert done.returncode == 2
    assert "step 4: gradients" in done.stderr
    assert "2 updates before it were left out already (faults.max_skipped_steps)" in done.stderr
    assert saved(tmp_path) == []


def test_an_alarm_can_end_the_run_saved(digit_shards, tmp_path):
    options = {"training.train_iters": 40, "faults.positive_log_ratio_floor": 5.0, "faults.on_alarm": "stop"}
    done = run_tool(SCRIPT, *arguments(digit_shards, **options), cwd=tmp_path)
    assert done.returncode == 2
    assert "nats an image token (faults.positive_log_ratio_floor 5)" in done.stderr
    assert "alarm at step 9: the positive log-ratio has fallen" in done.stdout
    assert saved(tmp_path) == [10]
    assert named(tmp_path) == ["started", "alarm", "saved", "failed"]


@pytest.fixture
def disk(tmp_path):
    """A file system on which one checkpoint has room and two have not."""
    with mounted(tmp_path / "run", "7m") as folder:
        yield folder


@pytest.mark.parametrize(("ranks", "async_save"), [(1, "true"), (2, "false")])
def test_a_full_disk_costs_no_checkpoint_and_no_step(ranks, async_save, digit_shards, tmp_path, disk):
    settings = {"training.save_interval": 2, "training.async_save": async_save, "logging.tensorboard": "true"}
    options = arguments(digit_shards, **settings, **(TP2 if ranks == 2 else {}))
    jobs = start_job(ranks, SCRIPT, *options, cwd=tmp_path)
    assert ended(jobs, 120) == [2] * ranks
    assert len(losses(tmp_path)) == STEPS
    said = (tmp_path / "rank0.out").read_text()
    assert "step 4 could not be saved: " in said
    assert "No space left on device" in said
    assert "step 8, the last one, could not be saved in run/checkpoints" in stderr(tmp_path, 0).splitlines()[-1]
    assert saved(tmp_path) == [2]
    check_whole(layout.iteration_folder(disk / layout.FOLDER, 2), "key")
    assert not [*(disk / layout.FOLDER).glob(".*")]
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
    done = run_tool(SCRIPT, *options[: -2 * len(TP2)] if ranks == 2 else options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert saved(tmp_path) == [2, 4, 6, 8]


def test_a_folder_with_checkpoints_is_refused_where_a_fresh_start_is_wanted(digit_shards, tmp_path):
    options = arguments(digit_shards, **{"training.train_iters": 2})
    assert run_tool(SCRIPT, *options, cwd=tmp_path).returncode == 0
    done = run_tool(SCRIPT, *options, "--no-auto-resume", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        "megatron_cca: error: training.output_dir: run/checkpoints holds checkpoints, the newest of step 2; leave "
        "--no-auto-resume out to continue"
    )


@pytest.mark.full
def test_torchrun_restarts_after_a_kill(uninterrupted, digit_shards, tmp_path):
    """The rank kills itself as the kernel's out-of-memory killer would, once."""
    script = injected(
        tmp_path,
        """
        import os, signal
        import megatron_cca.training.loop as loop
        train_step = loop.train_step
        def killed(run):
            if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and run.iteration == 5:
                # Step 4 is saved in the background. However slow the disk is, it is there before the rank dies.
                run.saver.finish()
                if os.environ["RANK"] == "1":
                    os.kill(os.getpid(), signal.SIGKILL)
            return train_step(run)
        loop.train_step = killed
        """,
    )
    options = arguments(digit_shards, **TP2, **{"training.save_interval": 2})
    done = torchrun(2, "--max-restarts=1", str(script), *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path) == pytest.approx(uninterrupted, rel=1e-5)
    resumed = [event for event in events(tmp_path) if event["event"] == "resumed"]
    assert [(event["restart"], event["step"]) for event in resumed] == [(1, 4)]


@pytest.mark.full
def test_a_short_soak(digit_shards, tmp_path):
    """Six of the kills of tests/soak.py."""
    tally = soak.soak(tmp_path, str(digit_shards), 6, "TP 2", seed=3, shown=False)
    assert tally.kills == 6


SLOW_DISK = """
    import time
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    filesystem_async.FileSystemWriterAsync.write_preloaded_data = staticmethod(lambda *a, **k: time.sleep(1000))
"""


def test_no_writer_outlives_a_killed_rank(digit_shards, tmp_path):
    options = arguments(digit_shards, **{"training.train_iters": 10000, "training.save_interval": 2})
    with running(1, injected(tmp_path, SLOW_DISK), *options, cwd=tmp_path, at_step=3) as (job,):
        writers = psutil.Process(job.pid).children()
        assert len(writers) == 1
        os.kill(job.pid, signal.SIGKILL)
        _, alive = psutil.wait_procs(writers, timeout=10)
        assert not alive


def test_a_killed_writer_costs_its_checkpoint_and_no_step(digit_shards, tmp_path):
    options = arguments(digit_shards, **{"training.train_iters": 10000, "training.save_interval": 2})
    with running(1, injected(tmp_path, SLOW_DISK), *options, cwd=tmp_path, at_step=3) as (job,):
        (writer,) = psutil.Process(job.pid).children()
        writer.kill()
        deadline = time.monotonic() + 60
        while "save_failed" not in named(tmp_path):
            assert time.monotonic() < deadline
            assert job.is_alive(), stderr(tmp_path, 0)
            time.sleep(0.05)
    failed = next(event for event in events(tmp_path) if event["event"] == "save_failed")
    assert (failed["step"], failed["reason"]) == (2, "the writing process of rank 0 was killed")
