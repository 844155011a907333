"""``examples/cluster/ssh.sh``: two agents under an ssh that runs everything here; refusals, failures and signals."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import psutil
import pytest

from tests.distributed.launch import LIMIT, ROOT, environment
from tests.distributed.test_faults import TP2, arguments, losses
from tests.references import fake_ssh

LAUNCHER = ROOT / "examples" / "cluster" / "ssh.sh"

STUB = f"""#!/bin/sh
# Stands for Python on the machines: the check is Python's own, the agent does what FAKE_HOST_DOES says of its machine.
[ "$1" = -c ] && exec {sys.executable} "$@"
end() {{ echo "agent.py on $FAKE_HOST: $2"; exit "$1"; }}
trap 'end 143 SIGTERM' TERM
trap 'end 138 SIGUSR1' USR1
trap 'end 129 SIGHUP' HUP
echo "slots: $*" | grep -o "nproc-per-node=[^ ]*"
case " $FAKE_HOST_DOES " in
*" $FAKE_HOST:deaf "*) trap '' TERM USR1 ;;
*" $FAKE_HOST:refuses "*) echo "megatron_cca: error: data.path: nowhere" >&2; end 2 refused ;;
*" $FAKE_HOST:finishes "*) exit 0 ;;
esac
: > "$STARTED/$FAKE_HOST"
while :; do sleep 0.05; done
"""


@pytest.fixture
def cluster(tmp_path):
    """Machines a and b, with a stub for Python; returns environment and options."""
    started = tmp_path / "started"
    started.mkdir()
    (tmp_path / "python").write_text(STUB)
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "hosts").write_text("a 2\n\n# not this one\nuser@b  # the second\n")
    variables = environment() | fake_ssh.install(tmp_path / "bin") | {"STARTED": str(started), "FAKE_HOST_DOES": ""}
    return variables, ["--hosts", str(tmp_path / "hosts"), "--python", str(tmp_path / "python")]


def run(cluster, *options, does="", timeout=60):
    variables, own = cluster
    command = ["bash", str(LAUNCHER), *own, *map(str, options)]
    variables = variables | {"FAKE_HOST_DOES": does}
    return subprocess.run(command, cwd="/", env=variables, capture_output=True, text=True, timeout=timeout, check=False)


@contextmanager
def running(cluster, folder, does=""):
    variables, own = cluster
    with (folder / "log").open("w") as log:
        # bash cannot trap what was ignored before it began, as Ctrl-C is in a shell's background.
        heed = ["env", "--default-signal=INT,HUP", "bash"]
        environment = variables | {"FAKE_HOST_DOES": does}
        job = subprocess.Popen([*heed, str(LAUNCHER), *own], cwd="/", env=environment, stdout=log, stderr=log)
    try:
        wait_for(lambda: len(list((folder / "started").iterdir())) == 2)
        yield job
    finally:
        job.kill()
        job.wait()


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.05)


def nothing_runs(folder):
    """No process of the stub is left."""
    mine = str(folder / "python")
    return not any(mine in (process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"]))


def test_all_finish(cluster):
    done = run(cluster, does="a:finishes user@b:finishes")
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.splitlines()) == ["[a] nproc-per-node=2", "[user@b] nproc-per-node=gpu"]


def test_one_that_refuses_ends_all_and_is_named(cluster, tmp_path):
    done = run(cluster, does="user@b:refuses")
    assert done.returncode == 2
    assert done.stderr == "ssh.sh: user@b ended first: exit status 2: megatron_cca: error: data.path: nowhere\n"
    assert "[user@b] megatron_cca: error: data.path: nowhere\n" in done.stdout
    assert "[a] agent.py on a: SIGHUP\n" in done.stdout
    assert nothing_runs(tmp_path)


@pytest.mark.parametrize(
    ("number", "status", "line"),
    [
        (signal.SIGTERM, 143, "SIGTERM"),
        (signal.SIGINT, 143, "Ctrl-C"),
        (signal.SIGUSR1, 138, "SIGUSR1"),
    ],
)
def test_signals_let_the_run_save(number, status, line, cluster, tmp_path):
    with running(cluster, tmp_path) as job:
        job.send_signal(number)
        assert job.wait(30) == status
    said = (tmp_path / "log").read_text()
    assert f"ssh.sh: {line}: the run finishes its step, saves and leaves\n" in said
    assert nothing_runs(tmp_path)


def test_a_second_signal_ends_the_run_at_once(cluster, tmp_path):
    with running(cluster, tmp_path, does="a:deaf user@b:deaf") as job:
        job.send_signal(signal.SIGTERM)
        wait_for(lambda: "saves and leaves" in (tmp_path / "log").read_text())
        job.send_signal(signal.SIGTERM)
        assert job.wait(30) == 129
    assert nothing_runs(tmp_path)


def test_a_killed_launcher_lets_the_machines_save(cluster, tmp_path):
    with running(cluster, tmp_path) as job:
        job.kill()
    wait_for(lambda: nothing_runs(tmp_path))


def test_a_lost_machine_is_named(cluster, tmp_path):
    with running(cluster, tmp_path) as job:
        mine = str(tmp_path / "python")
        agents = [one for one in psutil.process_iter(["cmdline", "environ"]) if mine in (one.info["cmdline"] or [])]
        for one in agents:
            if one.info["environ"].get("FAKE_HOST") == "a":
                os.kill(one.pid, signal.SIGKILL)
        assert job.wait(60) == 137
    assert "ssh.sh: a ended first: exit status 137\n" in (tmp_path / "log").read_text()
    assert nothing_runs(tmp_path)


HOSTS = "--hosts: a file with a line for each machine is missing; --help says more"


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("", "--hosts: {hosts} names no machine"),
        ("a\nb 0\n", "{hosts}: line 2: SLOTS is '0'; it wants HOST [SLOTS], SLOTS at least 1"),
        ("a slots=8\n", "{hosts}: line 1: SLOTS is 'slots=8'; it wants HOST [SLOTS], SLOTS at least 1"),
        ("a 8 b 8", "{hosts}: line 1: 'b 8' is too much; it wants HOST [SLOTS]"),
        ("-oProxyCommand=x", "{hosts}: line 1: '-oProxyCommand=x' is not the name of a machine"),
        ("a\nb\na\n", "{hosts}: line 3: a stands there twice; one agent a machine starts all its ranks"),
    ],
)
def test_bad_lines_of_the_hosts_file_are_named(content, line, cluster, tmp_path):
    (tmp_path / "hosts").write_text(content)
    refused(run(cluster), line.format(hosts=tmp_path / "hosts"))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--hosts", ""], HOSTS),
        (["--hosts", "/nowhere"], "--hosts: /nowhere is not there; it wants a line for each machine: HOST [SLOTS]"),
        (["--hosts"], "--hosts: its value is missing"),
        (["--max-restarts", "many"], "--max-restarts: 'many' is not a number"),
        (["--port", "ssh"], "--port: 'ssh' is not a number"),
        (["--env", "NCCL_DEBUG"], "--env: 'NCCL_DEBUG' is not NAME=VALUE"),
    ],
)
def test_bad_options_are_named(options, line, cluster):
    refused(run(cluster, *options), line)


def test_what_is_missing_on_a_machine_is_named_for_each(cluster, tmp_path):
    (tmp_path / "hosts").write_text("a\ngone1\ngone2\n")
    line = "ssh.sh: error: {0}: not reached: ssh: connect to host {0} port 22: Connection refused\n"
    done = run(cluster)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line.format("gone1") + line.format("gone2"))
    assert not list((tmp_path / "started").iterdir())
    (tmp_path / "hosts").write_text("a\n")
    away = "put the repository at one path, or name it by --directory"
    refused(run(cluster, "--directory", "/no where"), f"a: /no where is not there; {away}")
    refused(run(cluster, "--directory", tmp_path), f"a: {tmp_path} is not the repository; --directory names it")
    python = "no Python at /nowhere/python; run make install there, or name it by --python"
    refused(run(cluster, "--python", "/nowhere/python"), f"a: {python}")
    refused(run(cluster, "--config", "my.yaml"), f"a: --config: my.yaml is not there (looked for in {ROOT})")


def refused(done, line):
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"ssh.sh: error: {line}\n")


def test_help_names_every_option(cluster):
    done = run(cluster, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    for option in ("--hosts", "--directory", "--python", "--address", "--port", "--env", "--max-restarts"):
        assert f"  {option} " in done.stdout


@pytest.mark.full
def test_two_machines_train(cluster, digit_shards, tmp_path):
    """The real thing; quotes and spaces in arguments arrive as they are."""
    (tmp_path / "hosts").write_text("localhost 1\n127.0.0.1 1\n")
    run_folder = tmp_path / "it's a" / "run"
    settings = {"training.train_iters": 3, "training.output_dir": run_folder}
    options = arguments(digit_shards, **TP2, **settings)
    done = run(cluster, "--python", sys.executable, "--", "--device", "cpu", *options, timeout=LIMIT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(losses(run_folder.parent)) == 3
    assert "TP 2 x PP 1 on 2 process(es)" in done.stdout
