"""``ssh`` for tests of ``examples/cluster/ssh.sh``: every machine is this one; some cannot be reached."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path


def install(folder: Path) -> dict[str, str]:
    """Put ``ssh`` into a folder; returns the variables with which it is found."""
    folder.mkdir(parents=True)
    program = folder / "ssh"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" "$@"\n')
    program.chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


def main(arguments: list[str]) -> None:
    while arguments[0] == "-o":
        assert arguments[1].split("=")[0] in {"BatchMode", "ConnectTimeout", "ServerAliveInterval"}
        arguments = arguments[2:]
    host, command = arguments
    if host.startswith("gone"):
        print(f"ssh: connect to host {host} port 22: Connection refused", file=sys.stderr)
        sys.exit(255)
    # As sshd: the user's shell gets one string, and begins elsewhere.
    os.chdir("/")
    # Nor does the shell inherit that a hang-up is ignored, as under nohup.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.execve("/bin/sh", ["sh", "-c", command], {**os.environ, "FAKE_HOST": host})  # noqa: S606


if __name__ == "__main__":
    main(sys.argv[1:])
