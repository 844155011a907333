"""What several files of distributed tests begin with."""

import pytest

from tests.distributed.launch import run_workers
from tests.distributed.test_layout_parity import CCA


@pytest.fixture(scope="session")
def checkpoint(digit_shards, tmp_path_factory) -> str:
    """The folder of a CCA run of three steps on the digits: a model whose images are noise, but not all alike."""
    folder = tmp_path_factory.mktemp("checkpoint")
    overrides = [*CCA, f"data.path={digit_shards}", f"training.output_dir={folder}/run"]
    run_workers(1, "checkpoint_workers.resume", {"overrides": overrides, "steps": 3, "save": True}, folder)
    return str(folder / "run")
