"""Collecting tests/te leaves a process as it was, and says how they are run."""

import importlib
import sys

import pytest
import torch

MODULES = ("conftest", "rig", "test_resuming", "test_combinations")


def test_importing_what_collecting_imports_patches_nothing():
    before = dict(vars(torch.cuda)), dict(vars(torch.Tensor)), {name: getattr(torch, name) for name in ("empty", "mm")}
    for name in MODULES:
        importlib.import_module(f"tests.te.{name}")
    with pytest.raises(pytest.skip.Exception, match="-p tests\\.te\\.rig"):
        importlib.import_module("tests.te.test_emulated_kernels")
    after = dict(vars(torch.cuda)), dict(vars(torch.Tensor)), {name: getattr(torch, name) for name in ("empty", "mm")}
    assert after == before
    assert not any(name.startswith("transformer_engine") and module for name, module in sys.modules.items())
