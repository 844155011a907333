"""GPU tests: `pytest tests/gpu` on a machine with one GPU; elsewhere they skip and say so."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA device is visible; run `pytest tests/gpu` on a GPU machine")
        for item in items:
            if "tests/gpu" in str(item.path):
                item.add_marker(skip)
