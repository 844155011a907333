"""What a writer process answers through a file in memory."""

import os
import queue
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_cca import platform
from megatron_cca.checkpoint.saver import ResultsFile, writes_in_background
from megatron_cca.config.load import load_config
from megatron_cca.training.saving import warn_of_fork


def test_items_come_back_in_order_also_from_a_forked_child():
    results = ResultsFile()
    results.put({"first": [1] * 100_000})
    child = os.fork()
    if child == 0:
        results.put("second")
        os._exit(0)
    os.waitpid(child, 0)
    assert results.get_nowait() == {"first": [1] * 100_000}
    assert results.get_nowait() == "second"
    with pytest.raises(queue.Empty):
        results.get_nowait()


def open_files():
    return len([*Path("/proc/self/fd").iterdir()])


def test_the_file_goes_with_the_object():
    """A run of a week saves thousands of times."""
    before = open_files()
    results = [ResultsFile() for _ in range(5)]
    assert open_files() == before + 5
    del results
    assert open_files() == before


@pytest.mark.parametrize(("wanted", "on_a_cpu", "on_a_gpu"), [(None, True, False), (True, True, True), (False,) * 3])
def test_a_process_is_forked_on_a_cpu_and_on_a_gpu_only_where_it_is_asked_for(wanted, on_a_cpu, on_a_gpu, monkeypatch):
    assert writes_in_background(wanted) == on_a_cpu
    monkeypatch.setattr(platform, "current", lambda: platform.Platform("cuda", "nccl"))
    assert writes_in_background(wanted) == on_a_gpu


@pytest.mark.parametrize(("device", "wanted", "lines"), [("cuda", "true", 1), ("cuda", "null", 0), ("cpu", "true", 0)])
def test_a_fork_on_a_gpu_is_told_of(device, wanted, lines, monkeypatch):
    monkeypatch.setattr(platform, "current", lambda: SimpleNamespace(is_cuda=device == "cuda"))
    told = []
    log = SimpleNamespace(event=lambda event, line: told.append((event, line)))
    warn_of_fork(SimpleNamespace(config=load_config(None, [f"training.async_save={wanted}"])), log)
    assert len(told) == lines
    assert all(event == "forks" and line.startswith("training.async_save: true forks") for event, line in told)
