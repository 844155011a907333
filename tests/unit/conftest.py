"""Fixtures of the unit tests."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.references.fuzzing import Sandbox
from tests.references.huggingface import save_emu3


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
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def sandbox(tmp_path):
    """One for all cases of a fuzz test; each writes its files anew."""
    return Sandbox(tmp_path)
