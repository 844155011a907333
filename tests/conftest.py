"""Fixtures shared by all tests. The platform is installed first: Megatron-Core must not be imported before."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

# In a shell's background SIGINT arrives ignored, and every program that a test starts and interrupts inherits that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        # pytest-xdist's own process runs no test: half a gigabyte and some seconds less.
        return
    from megatron_cca import platform

    # With tests.te.rig what is installed already is an emulated GPU.
    gpu_only = all(re.search("tests/(gpu|te)", str(argument)) for argument in config.args) and bool(config.args)
    platform.install("auto" if gpu_only else "cpu")


@pytest.fixture(scope="session")
def digit_shards(tmp_path_factory) -> Path:
    """The real digits, tokenised once per test session; drawn ones without scikit-learn, which has the real ones."""
    from megatron_cca.models.emu3 import tiny_vocabulary
    from tests.references.drawn_digits import shards_of_digits

    return shards_of_digits(tiny_vocabulary(), tmp_path_factory.mktemp("data") / "digits")


@pytest.fixture(scope="session")
def tiny_var(tmp_path_factory) -> list[str]:
    """Overrides of a run of VAR's tiny model, with a checkpoint and shards."""
    from tests.references.tiny_var import settings

    return settings(tmp_path_factory.mktemp("var"))


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """By family of ``tests/families.py`` and form: a folder of models, data and the oracle's answers."""
    from tests.families import make
    from tests.selection import Computed

    return Computed(lambda case: make(case, tmp_path_factory.mktemp("family")))
