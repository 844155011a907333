"""The processes that do a study's tasks side by side; nothing here loads Megatron-Core before the platform."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.sharedctypes import Synchronized

from megatron_cca import platform
from megatron_cca.lab.studies.tasks import Outcome, Task


def start(device: platform.DeviceChoice, started: Synchronized) -> None:
    """Prepare a worker: its own device of several, and no life without the program that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()
    with started.get_lock():
        os.environ["LOCAL_RANK"] = str(started.value)
        started.value += 1
    platform.install(device)


def _leave_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    # Megatron-Core's saving leaves one that would stay behind.
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(1)


def do(task: Task) -> Outcome:
    """See :func:`megatron_cca.lab.studies.work.perform`."""
    # Imported late: Megatron-Core must not be imported before the platform is installed.
    from megatron_cca.lab.studies.work import perform

    return perform(task)
