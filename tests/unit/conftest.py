"""Fixtures of the unit tests."""

import shutil
import socket
from pathlib import Path

import pytest
import torch

from tests.references.emu3_vq import save_original, small_vq
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


@pytest.fixture(scope="session")
def vq_model():
    """A small image tokenizer of Emu3's, as transformers has it."""
    return small_vq()


@pytest.fixture(scope="session")
def vq_folder(vq_model, tmp_path_factory):
    """The same as its authors' repository has it."""
    return save_original(vq_model, tmp_path_factory.mktemp("vq") / "original")


@pytest.fixture
def spoilt_vq(vq_folder, tmp_path):
    """A copy of that folder that may be damaged."""
    return Path(shutil.copytree(vq_folder, tmp_path / "vq"))


@pytest.fixture(scope="session")
def scan_folder(tmp_path_factory):
    """Scans with captions, which no test changes."""
    from tests.references.scan_jobs import NUMBER
    from tests.references.scans import write_scans

    return write_scans(tmp_path_factory.mktemp("scans") / "images", NUMBER)


@pytest.fixture
def scan_job(scan_folder, digit_shards, tmp_path):
    """What a job that tokenises them is asked for."""
    from megatron_cca.data.tokenizing import TokenizeSettings

    return TokenizeSettings(
        source=scan_folder,
        output=tmp_path / "shards",
        text_tokenizer=digit_shards,
        image_tokenizer=digit_shards,
        model="emu3-tiny",
        area=64,
        block=40,
        threads=2,
    )


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
