"""One rank of a distributed test: it joins the job, calls its worker, and leaves what that answers in a file."""

from __future__ import annotations

import faulthandler
import gc
import importlib
import itertools
import json
import signal
import traceback
from pathlib import Path

from megatron_cca import platform

platform.install("cpu")

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_cca.config import Config
from megatron_cca.parallel.process_groups import initialize_distributed

_JOINED = itertools.count()
_JOB = {}


def rank_main(worker: str, settings: dict, rank: int, ranks: int, rendezvous: str, answer: str) -> None:
    """Join, work, leave what rank 0 found (or what went wrong) in a file.

    Args:
        worker: ``file.function`` of this folder, or a function of ``workers.py``.
        settings: its argument.
        rank: this one.
        ranks: how many there are.
        rendezvous: a path that no other job uses.
        answer: where rank 0's answer goes; ``<answer>.rank<rank>`` is for what went wrong, and for where this rank
            stands when it gets SIGUSR1.
    """
    problem = Path(f"{answer}.rank{rank}")
    with problem.open("w") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=False)
        _JOB.update(rank=rank, world_size=ranks, rendezvous=rendezvous)
        # What is imported stays; looking through it would be most of the time that a later collection takes.
        gc.freeze()
        try:
            _join()
            result = _function(worker)(settings)
            if rank == 0:
                Path(answer).write_text(json.dumps(result))
            dist.barrier()
            dist.destroy_process_group()
        except BaseException:
            problem.write_text(traceback.format_exc())
            raise


def split_anew(config: Config) -> None:
    """Megatron's groups for one more layout. Collective over all ranks.

    Those of the layout before are closed, which Megatron leaves undone: on two ranks a layout keeps 60 threads and 90
    open files of gloo's.
    """
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
        dist.barrier()
        dist.destroy_process_group()
        gc.collect()
        _join()
    initialize_distributed(config)


def _join() -> None:
    # A file serves one rendezvous.
    file = f"file://{_JOB['rendezvous']}.{next(_JOINED)}"
    dist.init_process_group("gloo", init_method=file, rank=_JOB["rank"], world_size=_JOB["world_size"])


def _function(name: str):
    file, _, function = name.rpartition(".")
    return getattr(importlib.import_module(f"tests.distributed.{file or 'workers'}"), function)
