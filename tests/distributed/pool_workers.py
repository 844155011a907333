"""Workers that behave badly, for the tests of the pool; each function returns plain data."""

import logging
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_cca.config.load import load_config
from tests.distributed.ranks import split_anew


def sum_of_ranks(settings):
    total = torch.tensor(dist.get_rank())
    dist.all_reduce(total)
    return int(total)


def raising(settings):
    if dist.get_rank() == settings["rank"]:
        raise ValueError(f"the disk of rank {dist.get_rank()} is on fire")
    dist.barrier()


def dying(settings):
    if dist.get_rank() == settings["rank"]:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def hanging(settings):
    time.sleep(1000)


def state(settings):
    """Return what a job might have left behind in its process."""
    return {
        "pid": os.getpid(),
        "left": os.environ.get("LEFT"),
        "cwd": str(Path.cwd()),
        "threads": len(list(Path("/proc/self/task").iterdir())),
        "hook": sys.excepthook.__name__,
        "groups": parallel_state.model_parallel_is_initialized(),
        "random": torch.rand(1).item(),
        "interval": sys.getswitchinterval(),
        "signals": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
        "precision": torch.get_float32_matmul_precision(),
        "dtype": str(torch.get_default_dtype()),
        "grad": torch.is_grad_enabled(),
        "log": [logging.root.level, len(logging.root.handlers)],
    }


def untidy(settings):
    """Leave as much behind as training does, and more."""
    split_anew(load_config(None, ["training.seed=99"]))
    os.environ["LEFT"] = "behind"
    os.chdir("/")
    random.seed(1)
    torch.rand(7)
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, force=True)
    sys.setswitchinterval(0.5)
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
