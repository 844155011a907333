"""torchrun for launchers that go by exit statuses: one on each machine.

    python examples/cluster/agent.py --nnodes 2 --nproc_per_node 8 ... examples/pretrain_cca_emu3.sh --config my.yaml

It takes torchrun's arguments and PET_* variables and differs from it in three ways:

- It exits with what its ranks exited with, where torchrun exits with 1 for everything: 0 trained to the end; 2 refused;
  138 or 143 asked to go, and saved; above 128, another signal ended a rank (137: SIGKILL); 128 anything else. What is
  128 or more another attempt may cure, which is also how Kubeflow's ``restartPolicy: ExitCode`` reads it.
- SIGUSR1 and SIGUSR2 are passed on to the ranks as SIGTERM is, and they have ten minutes to finish their step and save
  (``--shutdown-timeout``). Signals that it is to ignore, as SIGHUP under nohup, it ignores, and so do the ranks.
- Restarts over several machines begin with a fresh store (TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Sequence

SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
DEFAULTS = {
    "PET_SIGNALS_TO_HANDLE": ",".join(
        name for name in SIGNALS if signal.getsignal(getattr(signal, name)) is not signal.SIG_IGN
    ),
    "PET_SHUTDOWN_TIMEOUT": "600",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}
REFUSED = 2
OTHER = 128


def main(arguments: Sequence[str] | None = None) -> int:
    """Run torchrun in this process.

    Args:
        arguments: torchrun's; None means the process's.

    Returns:
        The exit status, as above. torchrun's own refusals of its arguments leave as SystemExit.
    """
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    try:
        from torch.distributed import run
        from torch.distributed.elastic.multiprocessing import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.elastic.rendezvous.api import RendezvousError
    except ModuleNotFoundError as error:
        return _leave(f"{error.name} is not installed in {sys.executable}; run `make install` first", REFUSED)
    try:
        run.main(arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        _say(str(error))
        return _leave(f"rank {rank} ended with exit status {failure.exitcode}", _status(failure.exitcode))
    except SignalException as error:
        return _leave(f"{error.sigval.name}: passed on to the ranks, which have ended", OTHER + error.sigval)
    except RendezvousError as error:
        return _leave(f"the first machine, where all meet, is gone or was not reached: {error}", OTHER)
    except ValueError as error:
        return _leave(f"torchrun: {error} (on machines without GPUs --nproc_per_node takes a number)", REFUSED)
    return 0


def _status(exit_code: int) -> int:
    """A rank's exit code (negative: the signal that killed it) as an exit status."""
    if exit_code < 0:
        return OTHER - exit_code
    return exit_code if exit_code == REFUSED or exit_code >= OTHER else OTHER


def _leave(line: str, status: int) -> int:
    _say(f"agent.py on {socket.gethostname()}: {line}")
    return status


def _say(text: str) -> None:
    # The terminal may be what has gone.
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
