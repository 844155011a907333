"""GPU tests: `pytest tests/gpu` on a machine with one GPU; elsewhere they skip and say so.

They need no network, and of our optional packages none: what one of them is about is skipped without it.
"""

import pytest
import torch

from tests.te import rig

# Of one test on a GPU, in seconds: most take a few. What is emulated on a CPU takes as long as it takes.
LIMIT = 120


def pytest_collection_modifyitems(config, items):
    ours = [item for item in items if "tests/gpu" in str(item.path)]
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA device is visible; run `pytest tests/gpu` on a GPU machine")
        for item in ours:
            item.add_marker(skip)
    elif config.pluginmanager.hasplugin("timeout") and not rig.is_running():
        for item in ours:
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(LIMIT))
