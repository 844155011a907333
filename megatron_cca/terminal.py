"""What a terminal or a batch system does to a program: it sends signals, and it closes standard streams."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

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


_NAMES = {"stdout": "standard output", "stderr": "standard error"}
# Errors that may pass: a disk gets free space, a reader catches up.
_FOR_NOW = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EAGAIN)


class OutputClosed(BaseException):
    """A closed pipe: the reader of this program's output has gone.

    Only a program's end should catch it, as KeyboardInterrupt.
    """


class GuardedStream:
    """A text stream that does not raise when its other end closes. What cannot be written is lost.

    Args:
        stream: a standard stream.
        on_loss: called at the first loss, with what went wrong.
    """

    def __init__(self, stream: TextIO, on_loss: Callable[[OSError], None]) -> None:
        self._stream, self._on_loss = stream, on_loss
        self._is_known = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write as the stream does."""
        with self._losses():
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Write as the stream does."""
        with self._losses():
            self._stream.writelines(lines)

    def flush(self) -> None:
        """Flush as the stream does."""
        with self._losses():
            self._stream.flush()

    @contextmanager
    def _losses(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._let_go(for_now=error.errno in _FOR_NOW)
            if not self._is_known:
                self._is_known = True
                self._on_loss(error)

    def _let_go(self, *, for_now: bool) -> None:
        """Point the descriptor at /dev/null, so that C libraries and buffered text meet no error either."""
        # Not every stream has a descriptor.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            descriptor = self._stream.fileno()
            kept = os.dup(descriptor) if for_now else None
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
            try:
                self._stream.flush()
            finally:
                if kept is not None:
                    os.dup2(kept, descriptor)
                    os.close(kept)


class _Losses:
    """The listener that is told of a lost stream. There is one for the process."""

    def __init__(self) -> None:
        self.ends = False
        self.listener: Callable[[str, str], None] | None = None

    def lost(self, name: str, error: OSError) -> None:
        if self.ends and error.errno == errno.EPIPE:
            self.ends = False
            raise OutputClosed(f"{_NAMES[name]} is closed")
        if self.listener is not None:
            self.listener(_NAMES[name], error.strerror or str(error))


_LOSSES = _Losses()


@contextmanager
def guarded(*, ends: bool) -> Iterator[None]:
    """Keep both standard streams from raising inside the block.

    Args:
        ends: whether a closed pipe ends the program, as it ends ``cat``. The first write into it then raises
            :class:`OutputClosed`. A closed terminal and a full disk never end it.
    """
    before = sys.stdout, sys.stderr
    _fill_holes()
    _LOSSES.ends = ends
    streams = {
        name: GuardedStream(stream or open(os.devnull, "w"), lambda error, name=name: _LOSSES.lost(name, error))  # noqa: SIM115, PTH123
        for name, stream in zip(_NAMES, before, strict=True)
    }
    sys.stdout, sys.stderr = streams["stdout"], streams["stderr"]
    try:
        yield
    finally:
        ignore_losses()
        for stream in streams.values():
            stream.flush()
        sys.stdout, sys.stderr = before


def ignore_losses() -> None:
    """Let no loss end this program from now on. It is called before a program's last words."""
    _LOSSES.ends = False


@contextmanager
def report_losses_to(listener: Callable[[str, str], None]) -> Iterator[None]:
    """Call ``listener`` when a standard stream is lost inside the block, with the stream's name and the reason."""
    _LOSSES.listener = listener
    try:
        yield
    finally:
        _LOSSES.listener = None


def _fill_holes() -> None:
    """Open /dev/null for standard streams that were closed before the start.

    Later files must not take their descriptors.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
