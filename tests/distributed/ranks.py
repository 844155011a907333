"""One rank of a distributed test: a process that takes jobs, and is afterwards as it was before."""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import gc
import importlib
import importlib.machinery
import importlib.util
import itertools
import json
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import TextIO
from unittest import mock

from megatron_cca import platform

platform.install("cpu")

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_cca import reporting
from megatron_cca.config import Config
from megatron_cca.megatron_compat.optimizer_state import release
from megatron_cca.parallel.ranks import initialize_distributed
from megatron_cca.terminal import STOPPING

_HANDLED = STOPPING
_JOB = {}


def serve(line: Connection, stack: str) -> None:
    """Take jobs until one fails or the test process is gone.

    Args:
        line: where jobs come from; each is answered with (answer, None) or (None, the traceback).
        stack: a file for where this rank stands when it gets SIGUSR1.
    """
    with Path(stack).open("w") as stacks:
        # What is imported stays; looking through it would be most of the time that a later collection takes.
        gc.freeze()
        while True:
            try:
                job = line.recv()
            except (EOFError, KeyboardInterrupt):
                return
            with _restored(stacks):
                try:
                    answer = job()
                except BaseException:
                    line.send((None, traceback.format_exc()))
                    # Until it is killed: the others would take its end, or that of its groups, for their trouble.
                    with contextlib.suppress(EOFError):
                        line.recv()
                    return
            line.send((answer, None))


@dataclass
class WorkerJob:
    """A function that all ranks of a job call, and what rank 0 found as JSON.

    Attributes:
        worker: ``file.function`` of this folder, or a function of ``workers.py``.
        settings: its argument.
        rank, ranks: this one, and how many there are.
        rendezvous: a path that no other job uses.
    """

    worker: str
    settings: dict
    rank: int
    ranks: int
    rendezvous: str

    def __call__(self) -> str:
        """Join, work, leave."""
        _JOB.update(rank=self.rank, world_size=self.ranks, rendezvous=self.rendezvous, joined=itertools.count())
        _join()
        answer = json.dumps(_function(self.worker)(self.settings)) if self.rank == 0 else self._work()
        dist.barrier()
        return answer

    def _work(self) -> str:
        _function(self.worker)(self.settings)
        return "null"


@dataclass
class ProgramJob:
    """A program of ours, whose ``main`` is called with its arguments; answers with its exit status.

    Attributes:
        script, arguments: the command line.
        cwd: where it is called.
        files: where standard output and standard error go.
        variables: of its environment.
    """

    script: str
    arguments: list[str]
    cwd: str
    files: tuple[str, str]
    variables: dict[str, str] = field(default_factory=dict)

    def __call__(self) -> int:
        """Run it to its end."""
        # Undone by whoever takes the job.
        os.environ |= self.variables
        os.chdir(self.cwd)
        with _written_to(*self.files):
            return _status(self.script, self.arguments)


class _Left(BaseException):
    """The program has ended its process."""


def _leave(status: int) -> None:
    if threading.current_thread() is threading.main_thread():
        raise _Left(status)
    os._exit(status)


def _status(script: str, arguments: list[str]) -> int:
    """Call the program's ``main``; return the exit status that a process of its own would have ended with."""
    with mock.patch.object(sys, "argv", [script, *arguments]), mock.patch.object(reporting, "end_process", _leave):
        try:
            _program(script).main(arguments)
        except _Left as left:
            return left.args[0]
        except SystemExit as left:
            if left.code is None or isinstance(left.code, int):
                return left.code or 0
            print(left.code, file=sys.stderr)
            return 1
        except BaseException:
            traceback.print_exc()
            return 1
    return 0


@functools.cache
def _program(script: str) -> ModuleType:
    # By its loader, since the training program is a .sh.
    loader = importlib.machinery.SourceFileLoader(f"program_{Path(script).stem}", script)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


@contextlib.contextmanager
def _written_to(*files: str) -> Iterator[None]:
    """Standard output and error of this process, also of its libraries, into files."""
    kept = [os.dup(descriptor) for descriptor in (1, 2)]
    try:
        for descriptor, file in zip((1, 2), files, strict=True):
            handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, descriptor)
            os.close(handle)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, before in zip((1, 2), kept, strict=True):
            os.dup2(before, descriptor)
            os.close(before)


@contextlib.contextmanager
def _restored(stacks: TextIO) -> Iterator[None]:
    """Undo afterwards what a job does to its process."""
    handlers = {number: signal.getsignal(number) for number in _HANDLED}
    interval, folder, hook = sys.getswitchinterval(), Path.cwd(), sys.excepthook
    log, log_level = logging.root.handlers[:], logging.root.level
    torch.manual_seed(0)
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=False)
    try:
        with mock.patch.dict(os.environ):
            yield
    finally:
        faulthandler.unregister(signal.SIGUSR1)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.chdir(folder)
        sys.setswitchinterval(interval)
        # torch.distributed puts one more around it each time that a job is joined.
        sys.excepthook = hook
        # Megatron-LM's imports make it write to standard output.
        logging.root.handlers[:] = log
        logging.root.setLevel(log_level)
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)
        _close_groups()
        get_cuda_rng_tracker().reset()


def split_anew(config: Config) -> None:
    """Megatron's groups for one more layout. Collective over all ranks.

    Those of the layout before are closed, which Megatron leaves undone: on two ranks a layout keeps 60 threads and 90
    open files of gloo's.
    """
    if parallel_state.model_parallel_is_initialized():
        dist.barrier()
        _close_groups()
        _join()
    initialize_distributed(config)


def _close_groups() -> None:
    """Also forget the models: as long as one is there, so are its groups, of which each has threads and files."""
    for module in [found for found in gc.get_objects() if isinstance(found, DistributedDataParallel)]:
        release([module])
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()


def _join() -> None:
    # A file serves one rendezvous.
    file = f"file://{_JOB['rendezvous']}.{next(_JOB['joined'])}"
    dist.init_process_group("gloo", init_method=file, rank=_JOB["rank"], world_size=_JOB["world_size"])


def _function(name: str):
    file, _, function = name.rpartition(".")
    return getattr(importlib.import_module(f"tests.distributed.{file or 'workers'}"), function)
