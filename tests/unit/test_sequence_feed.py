"""The order of device work in the thread that reads ahead, on a device that does nothing before somebody waits for it.

Oracle: a queue whose copies run when it is waited for, as a GPU's do when it is busy. A source that returns the same
memory each turn stands for page-locked memory and for DALI's, both of which are written again.
"""

import contextlib
import threading
import time

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_cca.data import dali, loader
from megatron_cca.data.loader import SequenceFeed, loader_in_force
from megatron_cca.errors import UserError
from megatron_cca.platform import transfers

CPU, TURNS = torch.device("cpu"), 6


class Queue:
    """Copies that wait, in order; what CUDA calls a stream."""

    def __init__(self):
        self.waiting, self.log = [], []

    def synchronize(self):
        while self.waiting:
            self.waiting.pop(0)()
        self.log.append("done")


class Busy(TorchDispatchMode):
    """Conversions do nothing yet: they are queued, on the queue of the block or on the compute queue."""

    def __init__(self, compute):
        super().__init__()
        self.queue = self.compute = compute

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function is not torch.ops.aten._to_copy.default:
            return function(*arguments, **(options or {}))
        source = arguments[0].numpy()
        made = torch.full(source.shape, -1, dtype=options["dtype"])
        target, queue = made.numpy(), self.queue
        queue.waiting.append(lambda: np.copyto(target, source))
        queue.log.append("queued")
        return made

    @contextlib.contextmanager
    def on(self, queue):
        self.queue = queue
        yield
        self.queue = self.compute


@pytest.fixture
def busy_device(monkeypatch):
    """A device that is busy, and the queue beside the compute queue."""
    side, busy = Queue(), Busy(Queue())
    busy.side = side
    monkeypatch.setattr(torch.cuda, "stream", busy.on)
    monkeypatch.setattr(loader, "SideQueue", lambda device: side_queue(side))
    return busy


def side_queue(stream):
    work = transfers.SideQueue(CPU)
    work._stream = stream
    return work


def reused(busy):
    """Turns that return the same memory, from the thread that reads ahead, whose every conversion has to wait."""
    memory = np.empty((2, 3), dtype=np.int32)

    def source(turn):
        if turn == 0:
            busy.__enter__()
        busy.side.log.append(f"turn {turn}")
        memory[:] = turn
        return memory

    return source


def test_a_batch_is_whole_before_it_is_handed_over_and_before_its_memory_is_written_again(busy_device, monkeypatch):
    taken = []
    monkeypatch.setattr(loader, "used_here", lambda ids: taken.append((id(ids), threading.current_thread())) or ids)
    feed = SequenceFeed(reused(busy_device), 2, CPU, TURNS, "torch")
    for turn in range(TURNS):
        found = feed.next()
        assert torch.equal(found, torch.full((2, 3), turn))
        assert taken[-1] == (id(found), threading.current_thread())
    feed.close()
    assert busy_device.side.log[: 3 * TURNS] == [
        word for turn in range(TURNS) for word in (f"turn {turn}", "queued", "done")
    ]
    # What the training loop has queued, it need not wait for.
    assert busy_device.compute.log == []


class Staged:
    """Memory that its owner writes again as soon as nobody holds it, as DALI's does."""

    def __init__(self, held):
        self._held = held

    def to(self, device, non_blocking):
        self._held.append("queued")
        return self

    def long(self):
        return torch.zeros(1)

    def __del__(self):
        self._held.append("let go")


def test_what_is_copied_from_is_held_until_the_copy_is_done(busy_device):
    log = busy_device.side.log
    loader._mover(lambda array: Staged(log), CPU)(np.zeros(1))
    assert log == ["queued", "done", "let go"]


def test_no_batch_goes_to_the_device_while_a_graph_is_captured():
    stream, log = Queue(), []
    stream.synchronize = lambda: log.append("batch")
    move = side_queue(stream)

    def work():
        with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "stream", lambda queue: contextlib.nullcontext())
            stack.enter_context(move.finished())

    with transfers.without_side_work():
        thread = threading.Thread(target=work)
        thread.start()
        time.sleep(0.05)
        log.append("captured")
    thread.join()
    assert log == ["captured", "batch"]


@pytest.mark.parametrize(
    ("wanted", "installed", "expected"),
    [(None, True, "dali"), (None, False, "torch"), ("torch", True, "torch"), ("torch", False, "torch")],
)
def test_dali_is_taken_where_it_is_installed(wanted, installed, expected, monkeypatch):
    monkeypatch.setattr(dali, "is_installed", lambda: installed)
    assert loader_in_force(wanted) == expected


def test_a_dali_that_is_wanted_and_missing_is_refused(monkeypatch):
    monkeypatch.setattr(dali, "is_installed", lambda: False)
    with pytest.raises(UserError, match=r"^data\.loader: dali is not installed here; pip install .*set it to torch$"):
        loader_in_force("dali")


@pytest.mark.parametrize("loader", ["dali", "torch"])
def test_a_batch_stays_what_it_was_when_its_source_reuses_its_memory(loader):
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    memory = np.empty(10, dtype=np.int32)

    def source(turn):
        memory[:] = turn
        return memory[: 2 * (1 + turn % 5)].reshape(2, -1)

    feed = SequenceFeed(source, 2, CPU, 3, loader)
    kept = [feed.next() for _ in range(9)]
    feed.close()
    for turn, ids in enumerate(kept):
        assert ids.dtype == torch.int64
        assert torch.equal(ids, torch.full((2, 1 + turn % 5), turn))
