"""Fixtures of the unit tests."""

import shutil
import socket
from pathlib import Path

import pytest
import torch

from tests.references.fuzzing import Sandbox
from tests.references.huggingface import save_emu3
from tests.references.small_disk import mounted


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """Each form and dtype, saved once: name -> folder."""
    root = tmp_path_factory.mktemp("hub")
    found = {}

    def get(form, dtype="float32", **options):
        key = (form, dtype, *options.items())
        if key not in found:
            found[key] = save_emu3(root / str(len(found)), form, dtype=getattr(torch, dtype), **options)
        return found[key]

    return get


@pytest.fixture
def hf(hub, tmp_path):
    """A small original-form folder that may be spoilt."""
    return Path(shutil.copytree(hub("Emu3ForCausalLM"), tmp_path / "hf"))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 600 KB."""
    with mounted(tmp_path / "disk", "600k") as folder:
        yield folder


@pytest.fixture
def sandbox(tmp_path):
    """One for all cases of a fuzz test; each writes its files anew."""
    return Sandbox(tmp_path)


@pytest.fixture
def hf_cache(tmp_path, monkeypatch):
    """datasets' cache in a temporary folder, and no network at all."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def no_network(*_):
        raise AssertionError("network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
