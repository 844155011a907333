"""The ranks that tests share: they stay, they are as before after each job, and a job that fails takes nobody along."""

import json
import os
import signal
import time

import pytest

from tests.distributed.launch import SCRIPT, run_tool, run_workers
from tests.distributed.pool import Pool
from tests.distributed.ranks import WorkerJob
from tests.distributed.test_layout_parity import CCA, TP2


@pytest.fixture
def pool():
    own = Pool()
    yield own
    own.close()


def work(pool, folder, worker, ranks=2, timeout=60, **settings):
    """Run a worker of ``pool_workers.py``; return each rank's answer, as JSON."""
    folder.mkdir(exist_ok=True)
    rendezvous = str(folder / f"rendezvous{time.monotonic_ns()}")
    jobs = [WorkerJob(f"pool_workers.{worker}", settings, rank, ranks, rendezvous) for rank in range(ranks)]
    return pool.run(worker, jobs, timeout)


def test_ranks_stay_for_jobs_of_any_size(pool, tmp_path):
    for ranks in (2, 1, 4, 2):
        assert work(pool, tmp_path, "sum_of_ranks", ranks)[0] == str(sum(range(ranks)))
        if ranks == 2:
            first = pool.pids()[:2]
    assert pool.pids()[:2] == first
    assert len(pool.pids()) == 4


def test_ranks_that_no_job_wants_leave(pool, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.distributed.pool._IDLE_JOBS", 2)
    for ranks, left in ((2, 2), (1, 2), (1, 2), (1, 1), (2, 2)):
        work(pool, tmp_path, "sum_of_ranks", ranks)
        assert len(pool.pids()) == left


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_ranks_that_ended_between_two_jobs_are_replaced(number, pool, tmp_path):
    work(pool, tmp_path, "sum_of_ranks")
    first = pool.pids()
    process = pool._ranks[1].process
    os.kill(process.pid, number)
    process.join(30)
    assert work(pool, tmp_path, "sum_of_ranks")[0] == "1"
    assert not set(first) & set(pool.pids())


def test_one_that_raises_is_named_and_takes_no_neighbour_along(pool, tmp_path):
    work(pool, tmp_path, "sum_of_ranks")
    before = pool.pids()
    with pytest.raises(AssertionError) as error:
        work(pool, tmp_path, "raising", rank=1)
    said = str(error.value)
    assert said.startswith("raising on 2 ranks:\nrank 0: still at work:")
    # Where the other one waits for it.
    assert "in raising" in said
    assert "rank 1: Traceback" in said
    assert said.rstrip().endswith("ValueError: the disk of rank 1 is on fire")
    assert pool.pids() == []
    assert work(pool, tmp_path, "sum_of_ranks")[0] == "1"
    assert not {*before} & {*pool.pids()}


def test_one_that_dies_is_named(pool, tmp_path):
    with pytest.raises(AssertionError, match="rank 1: ended with exit code -9"):
        work(pool, tmp_path, "dying", rank=1)
    assert work(pool, tmp_path, "sum_of_ranks")[0] == "1"


def test_one_past_its_limit_says_where_it_stands(pool, tmp_path):
    with pytest.raises(AssertionError, match=r"(?s)rank 0: still at work:.*in hanging\b.*rank 1: still at work:"):
        work(pool, tmp_path, "hanging", timeout=2)
    assert work(pool, tmp_path, "sum_of_ranks")[0] == "1"


def test_what_a_job_leaves_behind_is_gone(pool, tmp_path):
    before = json.loads(work(pool, tmp_path, "state")[0])
    work(pool, tmp_path, "untidy")
    after = json.loads(work(pool, tmp_path, "state")[0])
    # Gloo's last threads may still be on their way out; the next test counts them.
    assert {**after, "threads": None} == {**before, "threads": None}


def test_training_does_not_pile_up(pool, digit_shards, tmp_path):
    """Process groups have dozens of threads and files each, which go with the models that use them."""
    common = [*CCA, f"data.path={digit_shards}"]
    jobs = {"common": common, "layouts": {"TP 2": TP2, "DP 2": []}, "steps": 1}
    counts = []
    for number in range(3):
        rendezvous = str(tmp_path / f"training{number}")
        pool.run("traces", [WorkerJob("traces", jobs, rank, 2, rendezvous) for rank in range(2)], 120)
        counts.append(json.loads(work(pool, tmp_path, "state")[0])["threads"])
    assert counts[2] - counts[1] < 20, counts


def test_a_program_ends_with_its_status_and_leaves_the_process_as_it_was(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\nfrom megatron_cca.reporting import end_with\n\n"
        "def main(argv):\n    os.environ['LEFT'] = 'behind'\n    print(os.getcwd())\n"
        "    if argv[0] == 'leaves':\n        end_with('a line', 138)\n"
        "    if argv[0] == 'raises':\n        raise RuntimeError('boom')\n"
        "    sys.exit({'says': 'a word', 'none': None, 'three': 3}[argv[0]])\n"
    )
    for argument, status, said in (
        ("none", 0, ""),
        ("three", 3, ""),
        ("says", 1, "a word\n"),
        ("leaves", 138, "a line\n"),
        ("raises", 1, "RuntimeError: boom\n"),
    ):
        done = run_tool(program, argument, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (status, f"{tmp_path}\n")
        assert done.stderr.endswith(said)
    assert run_workers(1, "pool_workers.state", {}, tmp_path)["left"] is None


def test_programs_and_workers_share_a_rank(tmp_path):
    pid = run_workers(1, "pool_workers.state", {}, tmp_path)["pid"]
    assert run_tool(SCRIPT, "--help", cwd=tmp_path).returncode == 0
    assert run_workers(1, "pool_workers.state", {}, tmp_path)["pid"] == pid != os.getpid()
