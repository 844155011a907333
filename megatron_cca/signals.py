"""Signals that ask a program to go, whoever sends them: a person, a terminal that closes, or a batch system."""

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
# nohup, and a shell that starts something in its background, ignore these on behalf of what they start.
_MAY_BE_IGNORED = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def handle(numbers: Iterable[int], handler: Callable | int) -> dict[int, Any]:
    """Install a handler for signals, but for those that whoever started this process wants ignored.

    Returns:
        What to give :func:`restore`.
    """
    heeded = [
        number for number in numbers if number not in _MAY_BE_IGNORED or signal.getsignal(number) is not signal.SIG_IGN
    ]
    return {number: signal.signal(number, handler) for number in heeded}


def restore(handlers: dict[int, Any]) -> None:
    """Put handlers back."""
    for number, handler in handlers.items():
        # One that was not installed from Python cannot be.
        if handler is not None:
            signal.signal(number, handler)


def launcher_environment() -> dict[str, str]:
    """Variables for a torchrun that is started here: it would heed a SIGHUP even under nohup, and end its ranks."""
    variable, default = "PET_SIGNALS_TO_HANDLE", (signal.SIGTERM, *_MAY_BE_IGNORED)
    heeded = [number.name for number in default if signal.getsignal(number) is not signal.SIG_IGN]
    return {} if variable in os.environ or len(heeded) == len(default) else {variable: ",".join(heeded)}
