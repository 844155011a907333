"""What a writer process answers through a file in memory."""

import os
import queue
from pathlib import Path

import pytest

from megatron_cca.checkpoint.background import ResultsFile


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
