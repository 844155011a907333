"""Two machines on one: network namespaces joined by a cable, or one namespace where the system allows no others."""

from __future__ import annotations

import functools
import os
import shlex
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Node:
    """One machine: its address, and how a command gets onto it."""

    number: int
    address: str = "127.0.0.1"
    interface: str = "lo"
    enter: list[str] = field(default_factory=list)

    @property
    def variables(self) -> dict[str, str]:
        return {"GLOO_SOCKET_IFNAME": self.interface}


@contextmanager
def two_nodes() -> Iterator[list[Node]]:
    """Two nodes that reach each other; in namespaces of their own if :func:`namespaces_allowed`."""
    if not namespaces_allowed():
        yield [Node(0), Node(1)]
        return
    with _joined_namespaces() as nodes:
        yield nodes


@functools.cache
def namespaces_allowed() -> bool:
    try:
        with _joined_namespaces():
            return True
    except (OSError, subprocess.SubprocessError):
        return False


@contextmanager
def _joined_namespaces() -> Iterator[list[Node]]:
    first = second = None
    # A user who is not root is root in a user namespace of their own, and both machines are in that one.
    user = [] if os.geteuid() == 0 else ["--map-root-user"]
    try:
        first = _machine([], user)
        enter = [_enter(first, user)]
        second = _machine(enter[0], [])
        enter.append(_enter(second, user))
        _on(enter[0], f"ip link add eth0 type veth peer name eth0 netns {second.pid}")
        for number in (0, 1):
            _on(enter[number], f"ip addr add 10.0.0.{number + 1}/24 dev eth0")
            _on(enter[number], "ip link set eth0 up")
            _on(enter[number], "ip link set lo up")
        yield [Node(number, f"10.0.0.{number + 1}", "eth0", enter[number]) for number in (0, 1)]
    finally:
        for machine in (first, second):
            if machine is not None:
                machine.kill()
                machine.wait()


def _machine(enter: list[str], user: list[str]) -> subprocess.Popen:
    """A process that holds a network namespace of its own open."""
    outside = Path("/proc/self/ns/net").readlink()
    # exec on every step, so that the process started is the one that sleeps.
    machine = subprocess.Popen([*enter, "unshare", *user, "--net", "sleep", "infinity"], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 10
    while machine.poll() is None and time.monotonic() < deadline:
        if Path(f"/proc/{machine.pid}/ns/net").readlink() != outside and _name(machine.pid) == "sleep":
            return machine
        time.sleep(0.01)
    machine.kill()
    raise OSError(f"no network namespace: {machine.communicate()[1].decode()}")


def _name(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def _enter(machine: subprocess.Popen, user: list[str]) -> list[str]:
    options = ["--user", "--preserve-credentials"] if user else []
    return ["nsenter", "--target", str(machine.pid), "--net", *options]


def _on(enter: list[str], command: str) -> None:
    subprocess.run([*enter, *shlex.split(command)], check=True, capture_output=True, timeout=10)
