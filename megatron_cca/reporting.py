"""End command-line programs in one line or with a traceback when something goes wrong."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_cca.errors import Stopped, SurroundingsError, UserError
from megatron_cca.io.paths import check_surroundings, surroundings_fault
from megatron_cca.terminal import OutputClosed, guarded, handle, ignore_losses

# A name of its own, so that a process that calls a program's main() can replace it and stay alive.
end_process = os._exit

# Parts of the errors that a rank gets when another one has gone. It then waits for torchrun to end it, so that torchrun
# reports the rank where the trouble began as the root cause.
_PEER_LOST = ("gloo", "nccl", "connection closed by peer", "connection reset by peer")
_PEER_WAIT_SECONDS = 20.0
# Not a key of the configuration, since errors are reported before one is read.
_PEER_WAIT = "MEGATRON_CCA_PEER_WAIT_SECONDS"

# Signals that stop a program that writes files, beside Ctrl-C.
_ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)

# Rank 0 alone reports an error that every rank sees. A rank that sees an error alone reports it after this wait.
_OTHER_RANKS_WAIT_SECONDS = 5.0

# The extra that brings each module a program may lack. setup.py has the packages.
_EXTRAS = {
    **dict.fromkeys(("PIL", "datasets", "nvidia", "tiktoken"), "data"),
    **dict.fromkeys(("matplotlib", "scipy", "sklearn", "torch-fidelity", "torchvision"), "eval"),
    **dict.fromkeys(("safetensors", "transformers"), "hf"),
}


@contextmanager
def reported_errors(*, needs_output: bool = False) -> Iterator[None]:
    """End the process on any error: bad input in one line with status 2, anything else with its traceback and status 1.

    Surroundings that cannot be used, such as a cache, are one line with status 2, too. An interruption (Ctrl-C) is one
    line with status 130. A run that was asked to stop ends in one line with status 128 + the signal's number. Standard
    output and error may close meanwhile, see :func:`terminal.guarded`.

    Under torchrun the text also goes to the agent's error file, so that torchrun reports it as the root cause. The
    process ends without waiting for collectives that will never finish. The agent then ends the others. A rank that has
    only lost another one first waits for the agent to end it. It waits 20 seconds, or what the environment variable
    MEGATRON_CCA_PEER_WAIT_SECONDS says.

    Args:
        needs_output: whether a closed pipe ends the program, in one line with status 141.
    """
    with guarded(ends=needs_output):
        yield from _reported()


@contextmanager
def reported_tool_errors(packages: Collection[str]) -> Iterator[None]:
    """Report errors as :func:`reported_errors` does, for a program that writes files.

    SIGTERM, SIGHUP and SIGQUIT end the program as Ctrl-C does. Under nohup SIGHUP does not. A closed pipe ends it, too.

    Args:
        packages: top-level modules that may be missing, with ``-`` for ``_``, as pip has their names.
    """
    handle(_ENDING, signal.default_int_handler)
    with reported_errors(needs_output=True):
        try:
            yield
        except ModuleNotFoundError as error:
            name = (error.name or "").replace("_", "-")
            if name not in packages:
                raise
            extra = _EXTRAS[name]
            raise UserError(f"{error.name} is not installed; pip install 'megatron-cca[{extra}]'") from None
        except OSError as error:
            raise surroundings_fault(error) or UserError(
                f"{error.filename or 'file system'}: {error.strerror or error}"
            ) from None


def end_with(text: str, status: int) -> None:
    """End this process at once. The text goes to standard error and to torchrun's error file."""
    ignore_losses()
    # This may be called outside of guarded(), as in a thread that outlives it.
    with suppress(OSError):
        sys.stdout.flush()
        print(text, file=sys.stderr, flush=True)
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file:
        # Its disk may be the full one. Standard error has the text already.
        with suppress(OSError):
            Path(error_file).parent.mkdir(parents=True, exist_ok=True)
            Path(error_file).write_text(json.dumps({"message": text, "timestamp": int(time.time())}))
    # Megatron-Core's saving starts a child that would outlive this process and keep its output open.
    for child in multiprocessing.active_children():
        child.kill()
    end_process(status)


def _reported() -> Iterator[None]:
    peer_wait = _PEER_WAIT_SECONDS
    try:
        peer_wait = _peer_wait_seconds()
        check_surroundings()
        yield
    except (UserError, SurroundingsError) as error:
        _leave_in_one_line(error)
    except Stopped as stopped:
        end_with(f"megatron_cca: {stopped}", stopped.status)
    except KeyboardInterrupt:
        end_with("megatron_cca: interrupted", status=130)
    except OutputClosed as closed:
        end_with(f"megatron_cca: {closed}, and nobody reads on; ended", status=128 + signal.SIGPIPE)
    except Exception as error:
        fault = surroundings_fault(error)
        if fault is not None:
            _leave_in_one_line(fault)
        rank = os.environ.get("RANK")
        if rank is not None and any(sign in str(error).lower() for sign in _PEER_LOST):
            _wait_to_be_ended(peer_wait)
        where = f"megatron_cca: rank {rank} failed\n" if rank is not None else ""
        end_with(where + traceback.format_exc(), status=1)


def _leave_in_one_line(error: Exception) -> None:
    if os.environ.get("RANK", "0") != "0":
        _wait_to_be_ended(_OTHER_RANKS_WAIT_SECONDS)
    end_with(f"megatron_cca: error: {error}", status=2)


def _peer_wait_seconds() -> float:
    text = os.environ.get(_PEER_WAIT)
    try:
        seconds = _PEER_WAIT_SECONDS if text is None else float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise UserError(f"{_PEER_WAIT}: must be a number of seconds, 0 or more, found {text!r}")
    return seconds


def _wait_to_be_ended(seconds: float) -> None:
    """Sleep, and let a signal end this process without another word."""
    handle((signal.SIGINT, *_ENDING), signal.SIG_DFL)
    time.sleep(seconds)
