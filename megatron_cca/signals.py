"""Signals that ask a program to stop. A person, a closing terminal or a batch system sends them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable
from typing import Any

STOPPING = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
)
# nohup, and a shell that starts a program in the background, let the program ignore these.
_MAY_BE_IGNORED = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def handle(numbers: Iterable[int], handler: Callable | int) -> dict[int, Any]:
    """Install a handler for signals. A signal that the parent process set to be ignored stays ignored.

    Returns:
        The former handlers, for :func:`restore`.
    """
    heeded = [
        number for number in numbers if number not in _MAY_BE_IGNORED or signal.getsignal(number) is not signal.SIG_IGN
    ]
    return {number: signal.signal(number, handler) for number in heeded}


def restore(handlers: dict[int, Any]) -> None:
    """Install the former handlers again."""
    for number, handler in handlers.items():
        # A handler that was not installed from Python cannot be installed again.
        if handler is not None:
            signal.signal(number, handler)


def launcher_environment() -> dict[str, str]:
    """Return environment variables for a torchrun that is started here.

    Without them it would handle SIGHUP even under nohup.
    """
    variable, default = "PET_SIGNALS_TO_HANDLE", (signal.SIGTERM, *_MAY_BE_IGNORED)
    heeded = [number.name for number in default if signal.getsignal(number) is not signal.SIG_IGN]
    return {} if variable in os.environ or len(heeded) == len(default) else {variable: ",".join(heeded)}
