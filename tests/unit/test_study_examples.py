"""The studies that come with the project, and the README that lists them."""

from pathlib import Path

import pytest

from megatron_cca.lab.studies.checks import check_study
from megatron_cca.lab.studies.study import open_study

STUDIES = Path(__file__).resolve().parents[2] / "examples" / "studies"
FILES = sorted(STUDIES.glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_study_can_run(file):
    study = open_study(file)
    check_study(study, 1)
    assert study.settings.name == file.stem
    assert len(study.settings.seeds) == 3
    assert f"`{file.name}`" in (STUDIES / "README.md").read_text(encoding="utf-8")
