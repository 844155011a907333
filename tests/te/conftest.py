"""Tests of Transformer Engine's own Python: on the rig, in a process of its own, or on a GPU; elsewhere they skip."""

import pytest
import torch

from tests.te import rig


def pytest_collection_modifyitems(items):
    if rig.is_running() or torch.cuda.is_available():
        return
    reason = rig.obstacle() or f"needs a GPU, or an emulated one in a process of its own: {rig.COMMAND}"
    for item in items:
        if "tests/te" in str(item.path):
            item.add_marker(pytest.mark.skip(reason=reason))
